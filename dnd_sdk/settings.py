"""Settings of the command line: flag > `DND_*` variable > `./dnd.toml` > the user's `config.toml` > default.

* One name everywhere: `n_slots` in a file is `DND_N_SLOTS` in the environment and `--n-slots` on the command line.
* A name that does not exist is refused, with the nearest one that does; of variables only those close to a setting,
  since the prefix is not ours alone.
* pydantic checks the values. Their sources are merged here: the library for that takes as long to import as all else
  that a command needs to be answered by a running server.
* The library reads no settings file: `DnD.load` takes arguments, and `Settings.load_arguments` are these.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, ValidationInfo, field_validator

from dnd_sdk.config import ENGINE_OF, SAMPLING, SamplingOptions
from dnd_sdk.errors import ConfigError
from dnd_sdk.models import DEFAULT_BASE

PREFIX = "DND_"
PROJECT_FILE = Path("dnd.toml")
"""Read from the working folder."""
OTHER_VARIABLES = frozenset({"DND_DEBUG", "DND_TEST_HOME", "DND_URL"})
"""Variables with our prefix that are no settings."""
MAX_FILE_BYTES = 1 << 20
_LIKE_A_SETTING = 0.75
"""Variables at least this similar to a setting's are taken for misspelt ones."""

SERVING = ("host", "port", "api_key", "allowed_hosts", "answer_tokens", "max_waiting", "log_prompts")
"""The names of those that only a server asks."""

Text = Annotated[str, Field(min_length=1)]


class Settings(BaseModel, title="dnd.toml"):
    """Every setting in force; `load_settings` finds them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    home: Text | None = Field(None, examples=["~/dnd"])
    """Folder for adapters and weights; the platform's user data folder unless set."""
    base: Text = DEFAULT_BASE
    """Base LLM: embedded name, folder or Hugging Face id."""
    generator: Text | None = Field(None, examples=["runs/generator/generator"])
    """Generator folder; the one shipped for the base, if any, unless set."""
    encoder: Text | None = Field(None, examples=["all-minilm-l6-v2"])
    """Prompt encoder: embedded name, folder or Hugging Face id; the generator's own unless set."""
    device: Text = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the base; auto is bfloat16 on CUDA and, for weights stored so, on a CPU that is fast at it, else float32."""
    n_slots: int | None = Field(None, ge=1, examples=[8])
    """How many adapters stay swapped in; 64, or as many as an eighth of the free memory holds, unless set."""
    r: int | None = Field(None, ge=1, le=64, examples=[16])
    """Rank of their slots, for imported adapters of a larger rank; the generator's own unless set."""
    deterministic: bool = False
    """Whether an answer never depends, by a rounding, on what else is answered at the time; slower."""
    engine: Literal["embedded", "vllm", "vllm-local"] = "embedded"
    """What runs the base: our own engine, a vLLM server, or a vLLM that is started in this process."""
    url: Text | None = Field(None, examples=["http://127.0.0.1:8000"])
    """Of the vLLM server."""
    key: SecretStr | None = Field(None, examples=["a-long-secret"])
    """What the vLLM server asks of whoever calls (its --api-key); nothing unless set."""
    shared: Text | None = Field(None, examples=["/mnt/dnd"])
    """Where the vLLM server sees the home folder; at the same path unless set."""
    vllm_args: Text | None = Field(None, examples=["--max-model-len 4096"])
    """Further options of a vLLM that is started in this process, as `vllm serve` takes them."""
    calibrate: bool = True
    """Whether adapters that are made for a label task are calibrated on its prompts; about a second more."""
    max_new_tokens: int = SamplingOptions.max_new_tokens
    """Upper bound on an answer's tokens."""
    temperature: float = SamplingOptions.temperature
    """0 is greedy."""
    top_p: float = SamplingOptions.top_p
    """Nucleus mass, used when temperature > 0."""
    top_k: int = SamplingOptions.top_k
    """Most likely tokens to choose from when temperature > 0; 0 keeps every one."""
    min_p: float = SamplingOptions.min_p
    """Least share of the likeliest token's probability, used when temperature > 0."""
    repetition_penalty: float = SamplingOptions.repetition_penalty
    """Above 1, tokens that were said or asked become less likely."""
    seed: int | None = Field(SamplingOptions.seed, examples=[0])
    """Makes sampling repeatable; fresh randomness unless set."""
    stop: tuple[str, ...] = Field(SamplingOptions.stop, examples=[["\n\n"]])
    """Answers are cut before the first of these."""
    host: Text | None = Field(None, examples=["127.0.0.1"])
    """Where `dnd serve` listens; this machine alone unless set."""
    port: int | None = Field(None, ge=0, le=65_535, examples=[8000])
    """Its port; 8000 unless set, 0 is any that is free."""
    api_key: tuple[SecretStr, ...] = Field((), examples=[["agents=a-long-secret"]])
    """KEY or NAME=KEY, one of which each request must bring; none is needed unless set."""
    allowed_hosts: tuple[str, ...] = Field((), examples=[["dnd.example.org"]])
    """Names by which requests may call the server, beside its own."""
    answer_tokens: int | None = Field(None, ge=1, examples=[1024])
    """What an answer of the server may take where its request does not say; 1024 unless set."""
    max_waiting: int | None = Field(None, ge=0, examples=[256])
    """Requests that may wait at the server for others; 256 unless set."""
    log_prompts: bool | None = Field(None, examples=[False])
    """Whether the server's log holds what was asked and answered; it does not unless set."""

    @field_validator("stop", "api_key", "allowed_hosts", mode="before")
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
        given = {
            **self.model_dump(exclude={*SAMPLING, *SERVING}),
            "key": None if self.key is None else self.key.get_secret_value(),
        }
        # what is set for another engine stays unused
        return given | {name: None for name, engine in ENGINE_OF.items() if engine != self.engine}

    def serving(self) -> dict[str, Any]:
        """Fields of `ServerSettings`; those that are not set are left out."""
        given = {**self.model_dump(include=set(SERVING)), "api_keys": [k.get_secret_value() for k in self.api_key]}
        own = {k: v for k, v in given.items() if v is not None and k != "api_key"}
        return {**own, "sampling": self.model_dump(include=set(SAMPLING) - {"max_new_tokens"})}

    def sampling(self) -> dict[str, Any]:
        """Fields of `SamplingOptions`."""
        return self.model_dump(include=set(SAMPLING))


def load_settings(**flags: object) -> Settings:
    """The settings in force; a flag that is None (or an empty list) was not given.

    Raises `ConfigError` for an unreadable file, a name that does not exist or a bad value, saying where it stands.
    """
    _refuse_misspelt_variables()
    try:
        return Settings(**_merged(flags))
    except ValidationError as e:
        raise _refusal(e, origins(**flags)) from e


def origins(**flags: object) -> dict[str, str]:
    """Where each setting, and each unknown name, comes from: a flag, a variable, a file or `default`."""
    places = dict.fromkeys(Settings.model_fields, "default")
    for path in reversed(settings_files()):
        places |= dict.fromkeys(_read_file(path), str(path))
    places |= {name: PREFIX + name.upper() for name in _variables()}
    return places | {name: "--" + name.replace("_", "-") for name in _given(flags)}


def settings_files() -> tuple[Path, Path]:
    """The project's file and the user's, existing or not; the first one wins."""
    from platformdirs import user_config_path

    return PROJECT_FILE, user_config_path("dnd") / "config.toml"


def unknown_variables() -> list[str]:
    """Variables with our prefix that nothing reads; empty ones count as not set."""
    known = OTHER_VARIABLES | {PREFIX + name.upper() for name in Settings.model_fields}
    return sorted(v for v, text in os.environ.items() if text and v.startswith(PREFIX) and v.upper() not in known)


def template() -> str:
    """A commented settings file: every setting with its meaning and its default (or an example where it has none)."""
    lines = ["# Settings of dnd. A flag or a DND_* variable of the same name wins over this file."]
    for name, field in Settings.model_fields.items():
        value = field.examples[0] if field.examples else field.default
        lines += ["", f"# {field.description}", f"# {name} = {json.dumps(value)}"]
    return "\n".join(lines) + "\n"


def _merged(flags: dict[str, object]) -> dict[str, Any]:
    """Every value that is given anywhere, the strongest of each name."""
    values: dict[str, Any] = {}
    for path in reversed(settings_files()):
        values |= _read_file(path)
    return {**values, **_variables(), **_given(flags)}


def _variables() -> dict[str, str]:
    """The settings that are in the environment; empty ones count as not set."""
    told = {name.upper(): text for name, text in os.environ.items() if text}
    return {name: told[PREFIX + name.upper()] for name in Settings.model_fields if PREFIX + name.upper() in told}


def _given(flags: dict[str, object]) -> dict[str, Any]:
    values = {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}
    return {name: value for name, value in values.items() if value is not None and value != []}


def _refuse_misspelt_variables() -> None:
    for variable in unknown_variables():
        name = variable.removeprefix(PREFIX).lower()
        if near := difflib.get_close_matches(name, Settings.model_fields, n=1, cutoff=_LIKE_A_SETTING):
            raise ConfigError(f"{variable} is not a setting", fix=f"did you mean {PREFIX}{near[0].upper()}?")


def _read_file(path: Path) -> dict[str, Any]:
    """What a settings file says; nothing when it does not exist."""
    raw = _read_bytes(path)
    try:
        return tomllib.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise ConfigError(f"{path}, line {line}, is not UTF-8 text", fix="save the file as UTF-8") from e
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        why = str(e).replace("at end of document", f"at line {len(raw.splitlines())}, the last one")
        raise ConfigError(
            f"{path} is not valid TOML: {why}", fix="correct that line; `dnd config init --force` writes a sound file"
        ) from e


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


def _refusal(error: ValidationError, places: dict[str, str]) -> ConfigError:
    def told(problem: Any) -> str:
        name = str(problem["loc"][0])
        own = problem.get("ctx", {}).get("error")  # raised by SamplingOptions: names the setting and the value itself
        if name not in Settings.model_fields:
            return f"{places[name]}: {name!r} is not a setting"
        if isinstance(own, ConfigError):
            return f"{places[name]}: {own.message}"
        got = "" if name in ("api_key", "key") else f", got {str(problem['input'])[:80]!r}"  # a secret is not repeated
        return f"{places[name]}: {name}: {problem['msg']}{got}"

    fix = "correct it there; `dnd config schema` lists what is allowed"
    if unknown := [name for name in places if name not in Settings.model_fields]:
        near = difflib.get_close_matches(unknown[0], Settings.model_fields, n=1)
        fix = f"did you mean {near[0]!r}?" if near else f"the settings are {', '.join(Settings.model_fields)}"
    return ConfigError("; ".join(told(problem) for problem in error.errors()), fix=fix)
