"""Records a terminal: `python docs/record.py` runs the README's commands, writes terminal.svg and terminal.cast here.

* The commands run for real, in a new empty home that shares nothing but the weights (`--weights`), and see none of the
  caller's environment but PASSED_ON. `~` is that home's parent; anything else of this machine stops the recording.
* The picture is rich's export without its web font. The cast (asciicast v2) has the true times; `asciinema play` skips
  the waiting, by its `idle_time_limit`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    "dnd adapt examples/support_tickets/prompts.jsonl --name tickets",
    "dnd adapt examples/support_tickets/prompts.jsonl",
    'dnd route "My card was charged twice" --explain',
    'dnd run "Which queue: billing, login or shipping? I cannot sign in since the update." -a tickets --compare base',
    "dnd adapters ls",
)
PROMPT = "$ "
WIDTH = 120
"""Columns; longer lines of output are folded as a terminal folds them."""
IDLE_LIMIT_S = 2
PASSED_ON = ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "LANG", "SYSTEMROOT")
TEMPLATE = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px;
}}
.{unique_id}-title {{ font-family: sans-serif; font-size: 18px; font-weight: bold; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
"""rich's own template names a font on the web."""

Event = tuple[float, str]
"""Seconds since the start, and what appeared then."""
Runner = Callable[[str], Iterable[str]]
"""Runs a command line and yields its output line by line, as it comes."""


class RecordingError(Exception):
    """Nothing was written: a command failed, or its output names something of this machine."""


def record(run: Runner, hidden: Sequence[str], clock: Callable[[], float] = time.monotonic) -> list[Event]:
    """Run every command; raises `RecordingError` if the output holds one of the `hidden` texts."""
    started = clock()
    events: list[Event] = []

    def show(text: str) -> None:
        events.append((clock() - started, text))

    for command in COMMANDS:
        show(f"{PROMPT}{command}\n")
        for line in run(command):
            show(plain(line))
        show("\n")
    unfolded = "".join(text for _, text in events).replace("\n", "")  # what a line end may have split
    if found := [text for text in hidden if text in unfolded]:
        raise RecordingError(f"the output holds {len(found)} text(s) of this machine; nothing was written")
    return events


def plain(text: str) -> str:
    """Without colours and control characters, folded to WIDTH, with a line end."""
    from rich.cells import chop_cells
    from rich.text import Text

    line = "".join(c for c in Text.from_ansi(text.expandtabs()).plain if c.isprintable())
    return "\n".join(chop_cells(line, WIDTH) or [""]) + "\n"


def to_cast(events: Sequence[Event]) -> str:
    """An asciicast v2: a header, then one event a line."""
    height = sum(text.count("\n") for _, text in events) + 1
    header = {"version": 2, "width": WIDTH, "height": height, "idle_time_limit": IDLE_LIMIT_S, "title": "dnd"}
    rows = [header, *([round(at, 3), "o", text.replace("\n", "\r\n")] for at, text in events)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def to_svg(events: Sequence[Event]) -> str:
    """A dark terminal window: the same text, the commands in bold."""
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, file=io.StringIO(), width=WIDTH, force_terminal=True, color_system="truecolor")
    for _, text in events[:-1]:  # the last one is the empty line before a next prompt
        command = text.startswith(PROMPT)
        console.print(Text(text, style="bold bright_green" if command else ""), end="")
    svg: str = console.export_svg(title="dnd", code_format=TEMPLATE, unique_id="dnd")
    return svg


def in_home(folder: Path, weights: Path) -> Runner:
    """Runs `dnd` with `folder` as the user's folder and an empty home in it that links to the weights."""
    home = folder / ".dnd"
    home.mkdir()
    (home / "models").symlink_to(weights.resolve() / "models", target_is_directory=True)
    kept = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    own = {"HOME": str(folder), "DND_HOME": str(home), "COLUMNS": str(WIDTH), "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}

    def run(command: str) -> Iterator[str]:
        program = Path(sys.executable).with_name("dnd")
        words = [str(program), *shlex.split(command)[1:]]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(
            words, cwd=ROOT, env={**kept, **own}, encoding="utf-8", errors="replace", **pipes
        ) as done:
            assert done.stdout
            for line in done.stdout:
                yield line.replace(str(folder), "~")
        if done.returncode:
            raise RecordingError(f"`{command}` exited with {done.returncode}")

    return run


def of_this_machine() -> list[str]:
    """What must not be seen: folders, and the values of variables that sound secret."""
    folders = {text for text in (str(ROOT), sys.prefix, tempfile.gettempdir(), str(Path.home())) if len(text) > 1}
    sounds = re.compile("KEY|TOKEN|SECRET|PASSW|CREDENTIAL")
    return sorted(folders | {v for name, v in os.environ.items() if len(v) >= 8 and sounds.search(name.upper())})


def main(argv: Sequence[str] | None = None) -> int:
    """Record and write both files, or neither."""
    parser = argparse.ArgumentParser(description="Record the README's commands.")
    parser.add_argument("--weights", type=Path, default=ROOT / ".dnd", help="a home that holds the default weights")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder for terminal.svg and terminal.cast")
    args = parser.parse_args(argv)
    if not (args.weights / "models").is_dir():
        parser.error(f"no weights in {args.weights}; `make demo` fetches them into .dnd")
    with tempfile.TemporaryDirectory() as folder:
        try:
            events = record(in_home(Path(folder).resolve(), args.weights), of_this_machine())
        except RecordingError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    (args.out / "terminal.cast").write_text(to_cast(events), "utf-8")
    (args.out / "terminal.svg").write_text(to_svg(events), "utf-8")
    print(f"{len(COMMANDS)} commands in {events[-1][0]:.0f} s: {args.out / 'terminal.svg'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
