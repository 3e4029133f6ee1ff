"""How every command talks: data on stdout, notes and progress on stderr, `--json` as one object, errors in two lines.

* `Output` carries the four options that every command has; commands never write to a stream themselves.
* `error_exit` is the one place that turns an exception into text and an exit code.
* Progress bars appear only when stderr is a terminal; without one a step is a single line.
"""

from __future__ import annotations

import json as json_module
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import typer

from dnd_sdk.config import Home
from dnd_sdk.errors import AdapterNotFoundError, DndError, InputError

SCHEMA_VERSION = 1
EXIT_FAILURE, EXIT_USAGE, EXIT_PROBLEM, EXIT_NOT_FOUND, EXIT_INTERRUPTED = 1, 2, 3, 4, 130

Report = Callable[[int, int, str, float | None], None]
"""Called as report(done, total, about, seconds left or None)."""


@dataclass(frozen=True)
class Output:
    """The options every command has, and the only way a command prints."""

    json: bool = False
    """Print one JSON object instead of text."""
    quiet: bool = False
    """No notes on stderr; text output shrinks to names."""
    home: Path | None = None
    """None: as the settings have it, else the platform's user data folder."""
    debug: bool = False
    """Show tracebacks and debug logs."""

    def find_home(self) -> Home:
        """The home folder this command works in."""
        from dnd_sdk.settings import load_settings

        return Home.find(load_settings(home=self.home).home)

    def emit(self, payload: Mapping[str, Any], text: str | Callable[[], str]) -> None:
        """The command's result: `payload` as JSON with a schema version, or `text` (made only when shown)."""
        if self.json:
            typer.echo(json_module.dumps({"schema_version": SCHEMA_VERSION, **payload}, ensure_ascii=False))
            return
        shown = text if isinstance(text, str) else text()
        if shown:
            typer.echo(shown)

    def note(self, text: str) -> None:
        """One line for the person watching, on stderr."""
        if not self.quiet:
            typer.echo(text, err=True)

    def piece(self, text: str) -> None:
        """A piece of streamed text, on stdout, at once."""
        typer.echo(text, nl=False)
        sys.stdout.flush()

    @contextmanager
    def step(self, text: str) -> Iterator[Callable[[str], None]]:
        """Say that something slow is going on: a spinner on a terminal, otherwise one line.

        Yields what takes notes meanwhile; those of a fetch under way change the spinner's text, or are a line now and
        then.
        """
        if self.quiet:
            yield self.note
        elif sys.stderr.isatty():
            from rich.console import Console

            with Console(stderr=True).status(text) as status:
                yield _teller(partial(status.console.print, markup=False), lambda said, _: status.update(said))
        else:
            self.note(f"{text} ...")
            yield _teller(self.note, _Lines(self).say)

    @contextmanager
    def progress(self, text: str) -> Iterator[Report]:
        """Yield `report(done, total, about, eta_s)`: a bar on a terminal, else a line now and then."""
        if self.quiet:
            yield lambda done, total, about, eta_s: None
        elif sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            with Progress(console=Console(stderr=True), transient=True) as bar:
                task = bar.add_task(text, total=None)
                yield lambda done, total, about, eta_s: bar.update(
                    task, completed=done, total=total, description=f"{text} {about}{_left(eta_s)}"
                )
        else:
            lines = _Lines(self)
            yield lambda done, total, about, eta_s: lines.say(
                f"{text} {done}/{total} {about}{_left(eta_s)}", done >= total
            )


def _teller(note: Callable[[str], None], under_way: Callable[[str, bool], None]) -> Callable[[str], None]:
    """What takes notes: those of a fetch go to `under_way`, with whether it is over, the others to `note`."""
    from dnd_sdk.models import Fetching

    def tell(said: str) -> None:
        if isinstance(said, Fetching):
            under_way(said, said.done >= said.total)
        else:
            note(said)

    return tell


class _Lines:
    """Progress where there is no terminal: the first and last step, and one line per interval between."""

    INTERVAL_S = 30.0

    def __init__(self, out: Output) -> None:
        self._out, self._last = out, float("-inf")

    def say(self, text: str, last: bool) -> None:
        now = time.monotonic()
        if last or now - self._last >= self.INTERVAL_S:
            self._last = now
            self._out.note(text)


def _left(eta_s: float | None) -> str:
    return "" if eta_s is None else f", {eta_s / 60:.0f} min left" if eta_s >= 120 else f", {eta_s:.0f} s left"


def confidence(probability: float | None, in_distribution: float | None) -> str:
    """The probabilities of a routing decision in words, empty when neither was measured."""
    parts = [] if probability is None else [f"{probability:.0%} that the nearest adapter is this job's own"]
    parts += [] if in_distribution is None else [f"{in_distribution:.0%} that the prompts are a job and not noise"]
    return ", ".join(parts)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as text, as wide as the terminal, coloured only on one."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    drawn = Table(*columns, box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        drawn.add_row(*("" if cell is None else str(cell) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(drawn)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def read_text(text: str) -> str:
    """The text itself, or all of stdin for `-`. Raises `InputError` when it is empty or not UTF-8."""
    if text == "-":
        try:
            text = typer.get_binary_stream("stdin").read().decode("utf-8")
        except UnicodeDecodeError as e:
            raise InputError(f"stdin is not UTF-8 text: {e}", fix="pipe in UTF-8 text") from e
    if not text.strip():
        raise InputError("the text is empty", fix='give some text, for example: dnd run "What is 2 + 2?"')
    return text.strip()


def sized(n: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError("unreachable")


def wants(flag: str, argv: Sequence[str]) -> bool:
    """Whether `flag` is among the options of a raw command line."""
    return flag in (argv[: argv.index("--")] if "--" in argv else argv)


def error_exit(error: BaseException, argv: Sequence[str]) -> int:
    """Report `error` (two lines on stderr; JSON on stdout with `--json`) and return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        typer.echo("interrupted", err=True)
        return EXIT_INTERRUPTED
    if wants("--debug", argv) or os.environ.get("DND_DEBUG"):
        typer.echo("".join(traceback.format_exception(error)), err=True)
    if type(error).__name__ == "NoArgsIsHelpError":  # the parser has printed the help
        return EXIT_USAGE
    message, fix = _explain(error)
    if wants("--json", argv):
        body = {"type": type(error).__name__, "message": message, "fix": fix}
        typer.echo(json_module.dumps({"schema_version": SCHEMA_VERSION, "error": body}, ensure_ascii=False))
    typer.echo(f"error: {message}", err=True)
    if fix:
        typer.echo(f"fix: {fix}", err=True)
    return _code(error)


def _explain(error: BaseException) -> tuple[str, str | None]:
    if isinstance(error, DndError):
        return " ".join(error.message.split()), error.fix or "try: dnd doctor"
    if hasattr(error, "format_message"):  # a usage error of the command-line parser
        ctx = getattr(error, "ctx", None)
        return str(error.format_message()), f"try: {ctx.command_path if ctx else 'dnd'} --help"
    return " ".join(f"{type(error).__name__}: {error}".split()), "run again with --debug to see where it comes from"


def _code(error: BaseException) -> int:
    if isinstance(error, AdapterNotFoundError):
        return EXIT_NOT_FOUND
    return int(getattr(error, "exit_code", EXIT_FAILURE))
