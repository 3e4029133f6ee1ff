"""Role prompts in LangGPT's markdown: read leniently, kept to the letter.

* A role is a system prompt; its text goes to the base unchanged, and `str(Role.parse(text)) == text` for any text.
* Headings are known in English and Chinese, old spellings ("Constrains") included, whatever their case, number or
  colon; unknown sections are kept in their place.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dnd_sdk.errors import InputError
from dnd_sdk.prompts.shapes import checked_text

MAX_ROLE_BYTES = 64 * 2**10
"""Far above any role in use, and more than most bases can take as one message."""
BRIEF_BYTES = 64

_HEADINGS = {
    "role": ("role", "角色"),
    "profile": ("profile", "简介", "角色简介", "个人简介"),
    "background": ("background", "背景"),
    "description": ("description", "描述"),
    "goals": ("goal", "goals", "目标"),
    "skills": ("skill", "skills", "capabilities", "技能", "能力"),
    "rules": ("rule", "rules", "规则"),
    "constraints": ("constrains", "constraint", "constraints", "限制", "约束", "约束条件"),
    "workflow": ("workflow", "workflows", "工作流", "工作流程", "流程"),
    "commands": ("command", "commands", "命令"),
    "output_format": ("outputformat", "output format", "output", "输出", "输出格式"),
    "examples": ("example", "examples", "示例", "例子"),
    "reminder": ("reminder", "提醒"),
    "initialization": ("initialization", "initialisation", "init", "初始化"),
}
_KINDS = {spelling: kind for kind, spellings in _HEADINGS.items() for spelling in spellings}
_FIELDS = {"作者": "author", "版本": "version", "语言": "language", "描述": "description", "简介": "description"}
_NUMBER = re.compile(r"[-_ ]*\d+$")


@dataclass(frozen=True)
class Section:
    """A heading with the text up to the next one; the text before the first heading is a section without one."""

    text: str
    """As it stands in the file, heading included."""
    level: int = 0
    """Number of `#`; 0 without a heading."""
    title: str = ""
    """The heading's text."""

    @property
    def kind(self) -> str | None:
        """`"profile"`, `"rules"`, ...; None for a heading nobody knows."""
        head = unicodedata.normalize("NFKC", self.title).partition(":")[0].strip(" *_").casefold()
        return _KINDS.get(head) or _KINDS.get(_NUMBER.sub("", head))

    @property
    def value(self) -> str:
        """What the heading says after its colon."""
        return unicodedata.normalize("NFKC", self.title).partition(":")[2].strip(" *_")

    @property
    def body(self) -> str:
        """The text below the heading, without blank ends."""
        return (self.text.partition("\n")[2] if self.level else self.text).strip()


@dataclass(frozen=True)
class Role:
    """A role prompt; `parse` makes one from any text."""

    sections: tuple[Section, ...]

    @classmethod
    def parse(cls, text: str) -> Role:
        """Cut a role at its headings; raises `InputError` when it is blank, too large or no text."""
        if not isinstance(text, str):
            raise InputError(f"a role must be text, got {type(text).__name__}", fix="pass a str or a Role")
        _check(text, "the role")
        return cls(tuple(_sections(text)))

    def __str__(self) -> str:
        return "".join(section.text for section in self.sections)

    @cached_property
    def name(self) -> str | None:
        """What follows `# Role:`, else the first heading that is not a known one, else None."""
        for section in self.sections:
            if section.kind == "role":
                return section.value or section.body.partition("\n")[0].strip() or None
        return next((s.title for s in self.sections if s.level and s.kind is None), None)

    @cached_property
    def profile(self) -> dict[str, str]:
        """The `- Author: ...` lines of the profile, keys in lower-case English where they are known."""
        bodies = (s.body for s in self.sections if s.kind == "profile")
        lines = (unicodedata.normalize("NFKC", line).strip(" -*+\t") for body in bodies for line in body.splitlines())
        pairs = (line.partition(":") for line in lines)
        found = {key.strip(" *_").casefold(): value.strip(" *_") for key, colon, value in pairs if colon}
        return {_FIELDS.get(key, key): value for key, value in found.items() if key}

    def section(self, kind: str) -> str | None:
        """The text of every section of a kind (`"rules"`, `"workflow"`, ...), None without one."""
        bodies = [s.body for s in self.sections if s.kind == kind]
        return "\n\n".join(bodies) if bodies else None

    @cached_property
    def brief(self) -> str:
        """One line of at most `BRIEF_BYTES` bytes: name and description, or how the text begins."""
        described = self.profile.get("description") or self.section("description") or ""
        line = " ".join(f"{self.name or ''}. {described}".split()) if self.name or described else str(self)
        return " ".join(line.encode()[:BRIEF_BYTES].decode("utf-8", "ignore").split()).strip(" .")

    def condition(self, prompt: str) -> str:
        """A prompt as the encoder is to read it under this role.

        Encoders read a window of 64 to 256 tokens, a role alone is often longer, and a generator is trained on prompts
        without any. So only the brief goes in front: some 16 tokens (bytes bound them in any script, which characters
        do not) tell this role's prompts from another's and leave the prompt three quarters of the smallest window.
        Roles that differ below their brief are told apart exactly: the prompt set's hash and the router see all of it.
        """
        return f"{self.brief}\n{prompt}"


def role_text(role: Role | None) -> str | None:
    """The role's own text, as router and store know it; None without a role."""
    return None if role is None else str(role)


def as_role(role: Role | str | None) -> Role | None:
    """A role from what a caller may pass."""
    return role if role is None or isinstance(role, Role) else Role.parse(role)


def read_role(path: str | os.PathLike[str]) -> Role:
    """Read a role file; raises `InputError` when it is missing, too large, blank or not UTF-8 text."""
    file = Path(path)
    if not file.is_file():
        raise InputError(f"no role file {file}", fix="give a markdown file, see LangGPT's templates")
    try:
        with open(file, "rb") as f:
            raw = f.read(MAX_ROLE_BYTES + 4)  # a byte order mark more
    except OSError as e:
        raise InputError(f"cannot read {file}: {e.strerror or e}", fix="check the file's permissions") from e
    if len(raw) > MAX_ROLE_BYTES + 3:
        raise _too_large(str(file), file.stat().st_size)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(
            f"{file} is not UTF-8: byte 0x{raw[e.start]:02x} at offset {e.start}", fix="convert the file to UTF-8"
        ) from e
    _check(text, str(file))
    return Role.parse(text)


def _check(text: str, where: str) -> None:
    size = len(checked_text(text, where).encode())
    if size > MAX_ROLE_BYTES:
        raise _too_large(where, size)
    if "\0" in text:
        raise InputError(f"{where} holds a NUL byte: this is no text", fix="give a UTF-8 text file")
    if not text.strip():
        raise InputError(f"{where} is empty", fix="write a role, for example `# Role: Translator`")


def _too_large(where: str, size: int) -> InputError:
    return InputError(
        f"{where} has {size} bytes, a role has at most {MAX_ROLE_BYTES}", fix="shorten it: the base must read all of it"
    )


def _sections(text: str) -> Iterator[Section]:
    lines: list[str] = []
    level, title, fenced = 0, "", False
    for line in text.splitlines(keepends=True):
        found = None if fenced else _heading(line)
        if found is not None:
            if lines:
                yield Section("".join(lines), level, title)
            lines, (level, title) = [], found
        elif line.lstrip().startswith("```"):
            fenced = not fenced
        lines.append(line)
    yield Section("".join(lines), level, title)


def _heading(line: str) -> tuple[int, str] | None:
    """Level and title of a heading; the space after the `#` may be missing, as it often is."""
    rest = line.strip().lstrip("#")
    level = len(line.strip()) - len(rest)
    title = rest.strip(" #\t")
    return (level, title) if 1 <= level <= 6 and title and not line.startswith("    ") else None
