"""The commands that texts name: of the README, and of the headers of the example programs and recipes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

PROGRAMS = ("dnd", "make", "python", "pip", "asciinema", "source", "pytest", "bash", "git", "uv", "curl")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def typed_lines(block: str) -> list[str]:
    """The commands of one block: what stands behind its prompts, or every line where there are none."""
    lines = re.sub(r"\\\n\s*", "", block).splitlines()
    typed = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")] or lines
    return [command for line in typed if (command := re.split(r"(?:^|\s+)#", line)[0].strip())]


def markdown_commands(text: str) -> list[str]:
    """The commands of a Markdown text in its order, each once: lines of shell blocks, and code spans."""
    prose = _FENCE.sub("", text)
    rows = [line for line in prose.splitlines() if line.startswith("|")]
    running = "\n".join(line for line in prose.splitlines() if not line.startswith("|"))
    found = [s for s in _spans(running) if _is_command(s)]
    for row in rows:
        first, *others = row.strip("|").split(" | ")
        found += [*_continued(_spans(first)), *(s for cell in others for s in _spans(cell) if _is_command(s))]
    blocks = [body for language, body in _FENCE.findall(text) if language in ("sh", "console")]
    return list(dict.fromkeys([*(line for body in blocks for line in typed_lines(body)), *found]))


def header_commands(path: Path) -> list[str]:
    """The commands that an example's docstring, or the comments of a recipe, name: options alone continue one."""
    text = path.read_text("utf-8")
    if path.suffix == ".toml":
        comments = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
        return [line for line in comments if _is_command(line)]
    return list(dict.fromkeys(_continued(_spans(ast.get_docstring(ast.parse(text)) or ""))))


def _spans(text: str) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


def _is_command(text: str) -> bool:
    """A program with something behind it; its bare name is only talked about."""
    return text.partition(" ")[0].removeprefix(".venv/bin/") in PROGRAMS and " " in text


def _continued(spans: list[str]) -> list[str]:
    """`dnd config show`, `path` are two commands, and so are `dnd adapt PROMPTS --role x`, `--mode merge`."""
    found: list[str] = []
    for span in spans:
        if _is_command(span):
            found.append(span)
        elif found and span.startswith("--"):
            found.append(f"{found[-1].split(' --')[0]} {span}")
        elif found and re.fullmatch(r"[a-z]+", span) and len(found[0].split()) == 3:
            found.append(f"{found[-1].rpartition(' ')[0]} {span}")
    return found
