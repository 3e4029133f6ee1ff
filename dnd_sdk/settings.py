"""Settings of the command line: flag > `DND_*` variable > `./dnd.toml` > the user's `config.toml` > default.

* One name everywhere: `n_slots` in a file is `DND_N_SLOTS` in the environment and `--n-slots` on the command line.
* A name that does not exist is refused, with the nearest one that does; of variables only those close to a setting,
  since the prefix is not ours alone.
* The library reads no settings file: `DnD.load` takes arguments, and `Settings.load_arguments` are these.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from dnd_sdk.config import SAMPLING, SamplingOptions
from dnd_sdk.embedded import DEFAULT_BASE
from dnd_sdk.errors import ConfigError

PREFIX = "DND_"
PROJECT_FILE = Path("dnd.toml")
"""Read from the working folder."""
OTHER_VARIABLES = frozenset({"DND_DEBUG", "DND_TEST_HOME"})
"""Variables with our prefix that are no settings."""
MAX_FILE_BYTES = 1 << 20
_LIKE_A_SETTING = 0.75
"""Variables at least this similar to a setting's are taken for misspelt ones."""

Text = Annotated[str, Field(min_length=1)]


class Settings(BaseModel):
    """Every setting with its default."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, title="dnd.toml")

    home: Text | None = Field(None, examples=["~/dnd"])
    """Folder for adapters and weights; the platform's user data folder unless set."""
    base: Text = DEFAULT_BASE
    """Base LLM: embedded name, folder or Hugging Face id."""
    generator: Text | None = Field(None, examples=["runs/generator/generator"])
    """Generator folder; the one shipped for the default base unless set."""
    encoder: Text | None = Field(None, examples=["all-minilm-l6-v2"])
    """Prompt encoder: embedded name, folder or Hugging Face id; the generator's own unless set."""
    device: Text = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the base; auto is bfloat16 on CUDA, else float32."""
    n_slots: int = Field(8, ge=1)
    """How many adapters stay swapped in."""
    max_new_tokens: int = SamplingOptions.max_new_tokens
    """Upper bound on an answer's tokens."""
    temperature: float = SamplingOptions.temperature
    """0 is greedy."""
    top_p: float = SamplingOptions.top_p
    """Nucleus mass, used when temperature > 0."""
    top_k: int = SamplingOptions.top_k
    """Most likely tokens to choose from when temperature > 0; 0 keeps every one."""
    seed: int | None = Field(SamplingOptions.seed, examples=[0])
    """Makes sampling repeatable; fresh randomness unless set."""
    stop: tuple[str, ...] = Field(SamplingOptions.stop, examples=[["\n\n"]])
    """Answers are cut before the first of these."""

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator(*SAMPLING)
    @classmethod
    def _in_range(cls, value: Any, info: ValidationInfo) -> Any:
        SamplingOptions(**{str(info.field_name): value})
        return value

    def load_arguments(self) -> dict[str, Any]:
        """Arguments of `DnD.load`."""
        return self.model_dump(exclude=set(SAMPLING))

    def sampling(self) -> dict[str, Any]:
        """Fields of `SamplingOptions`."""
        return self.model_dump(include=set(SAMPLING))


def load_settings(**flags: object) -> Settings:
    """The settings in force; a flag that is None (or an empty list) was not given.

    Raises `ConfigError` for an unreadable file, a name that does not exist or a bad value, saying where it stands.
    """
    found = _find(flags)
    try:
        return Settings(**{name: value for name, (value, _) in found.items()})
    except ValidationError as e:
        raise _bad_values(e, found) from e


def origins(**flags: object) -> dict[str, str]:
    """Where each setting comes from: a flag, a variable, a file or `default`; raises like `load_settings`."""
    found = _find(flags)
    return {name: found[name][1] if name in found else "default" for name in Settings.model_fields}


def settings_files() -> tuple[Path, Path]:
    """The project's file and the user's, existing or not; the first one wins."""
    from platformdirs import user_config_path

    return PROJECT_FILE, user_config_path("dnd") / "config.toml"


def unknown_variables() -> list[str]:
    """Variables with our prefix that nothing reads and no setting resembles."""
    known = OTHER_VARIABLES | {PREFIX + name.upper() for name in Settings.model_fields}
    return sorted(v for v in os.environ if v.startswith(PREFIX) and v not in known)


def template() -> str:
    """A commented settings file: every setting with its meaning and its default (or an example where it has none)."""
    lines = ["# Settings of dnd. A flag or a DND_* variable of the same name wins over this file."]
    for name, field in Settings.model_fields.items():
        value = field.examples[0] if field.examples else field.default
        lines += ["", f"# {field.description}", f"# {name} = {json.dumps(value)}"]
    return "\n".join(lines) + "\n"


_Found = dict[str, tuple[Any, str]]
"""Per setting its value and where it stands."""


def _find(flags: Mapping[str, object]) -> _Found:
    found: _Found = {}
    for path in reversed(settings_files()):
        found |= {name: (value, str(path)) for name, value in _read_file(path).items()}
    found |= _from_environment()
    given = {name: value for name, value in flags.items() if value is not None and value != []}
    return found | {
        name: (str(value) if isinstance(value, Path) else value, "--" + name.replace("_", "-"))
        for name, value in given.items()
    }


def _from_environment() -> _Found:
    found: _Found = {}
    for variable, text in os.environ.items():
        name = variable.removeprefix(PREFIX).lower()
        if not text or not variable.startswith(PREFIX) or variable in OTHER_VARIABLES:
            continue
        if name in Settings.model_fields:
            found[name] = (text, variable)
        elif near := difflib.get_close_matches(name, Settings.model_fields, n=1, cutoff=_LIKE_A_SETTING):
            raise ConfigError(f"{variable} is not a setting", fix=f"did you mean {PREFIX}{near[0].upper()}?")
    return found


def _read_file(path: Path) -> dict[str, Any]:
    """What a settings file says; nothing when it does not exist."""
    raw = _read_bytes(path)
    try:
        found = tomllib.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise ConfigError(f"{path}, line {line}, is not UTF-8 text", fix="save the file as UTF-8") from e
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        why = str(e).replace("at end of document", f"at line {len(raw.splitlines())}, the last one")
        raise ConfigError(
            f"{path} is not valid TOML: {why}", fix="correct that line; `dnd config init --force` writes a sound file"
        ) from e
    for name in found:
        if name not in Settings.model_fields:
            near = difflib.get_close_matches(name, Settings.model_fields, n=1)
            fix = f"did you mean {near[0]!r}?" if near else f"the settings are {', '.join(Settings.model_fields)}"
            raise ConfigError(f"{path}: {name!r} is not a setting", fix=fix)
    return found


def _read_bytes(path: Path) -> bytes:
    try:
        if not path.exists():
            return b""
        if not path.is_file():  # a pipe would never end
            raise ConfigError(f"{path} is not a file", fix="rename or remove it")
        with path.open("rb") as f:
            raw = f.read(MAX_FILE_BYTES + 1)
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror or e}", fix="correct its permissions or remove it") from e
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES} bytes", fix="this cannot be a settings file")
    return raw


def _bad_values(error: ValidationError, found: _Found) -> ConfigError:
    def told(problem: Any) -> str:
        name = str(problem["loc"][0])
        value, where = found[name]
        own = problem.get("ctx", {}).get("error")  # raised by SamplingOptions: names the setting and the value itself
        if isinstance(own, ConfigError):
            return f"{where}: {own.message}"
        return f"{where}: {name}: {problem['msg']}, got {str(value)[:80]!r}"

    what = "; ".join(told(problem) for problem in error.errors())
    return ConfigError(what, fix="correct it there; `dnd config schema` lists what is allowed")
