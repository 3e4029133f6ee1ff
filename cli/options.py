"""Option groups: a command's parameter annotated `Output` or `ModelOptions` becomes that group's options.

So every command has the same `--json -q --home --debug`, spelled once, commands that load a model share
`--base --generator --encoder --device --engine ...`, commands that answer share the sampling flags, and those that
measure on tasks share `--set`. An option
that is not given comes from `dnd_sdk.settings`.
"""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dnd_sdk.cli.output import Output
from dnd_sdk.cli.task_sets import DEFAULT_SET, TaskSet
from dnd_sdk.config import ENGINE_OF, SamplingOptions
from dnd_sdk.errors import ConfigError, InputError

if TYPE_CHECKING:
    from dnd_sdk.prompts import Role
    from dnd_sdk.protocols import Workers
    from dnd_sdk.session import DnD
    from dnd_sdk.settings import Settings

GENERAL = "General"
MODEL = "Model"
SAMPLING = "Sampling"
WORKERS = "Workers"


@dataclass(frozen=True)
class SamplingFlags:
    """How text is completed; None and an empty list mean not given."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: list[str] | None = None


Field = Annotated[
    str | None,
    typer.Option("--field", help="The field that holds the prompt, as in question or body.messages; else it is found."),
]
RoleFile = Annotated[Path | None, typer.Option("--role", help="A role (LangGPT markdown) as the system message.")]


def read_role_option(path: Path | None) -> Role | None:
    """The role in the file that `--role` names; raises `InputError`."""
    if path is None:
        return None
    from dnd_sdk.prompts import read_role

    return read_role(path)


SchemaOption = Annotated[
    str | None,
    typer.Option(
        "--schema", metavar="FILE|JSON", rich_help_panel=SAMPLING, help="A JSON schema that the answer is held to."
    ),
]


def read_schema_option(schema: str | None) -> str | None:
    """The canonical text of what `--schema` gives: a JSON object or the file that holds one.

    Raises `InputError` for a file that cannot be read, `ConfigError` for what is no schema within limits.
    """
    if schema is None:
        return None
    from dnd_sdk.chat import checked_schema

    return checked_schema(schema if schema.lstrip().startswith("{") else _schema_file(Path(schema)))


def _schema_file(path: Path) -> str:
    from dnd_sdk.chat import MAX_SCHEMA_BYTES
    from dnd_sdk.files import plain_only

    try:
        with open(path, "rb", opener=plain_only) as f:
            raw = f.read(MAX_SCHEMA_BYTES + 1)
        text = raw.decode("utf-8-sig", "strict" if len(raw) <= MAX_SCHEMA_BYTES else "ignore")
    except (OSError, ValueError) as e:  # of Python: a NUL byte in the name, text that is not UTF-8
        why = e.strerror if isinstance(e, OSError) else e
        raise InputError(f"cannot read the schema {path}: {why}", fix="give a JSON file, or the JSON itself") from e
    if len(raw) > MAX_SCHEMA_BYTES:
        raise InputError(f"the schema {path} has more than {MAX_SCHEMA_BYTES} bytes", fix="ask for less at once")
    return text


@dataclass(frozen=True)
class ModelOptions:
    """Which models a command works with; None means not given."""

    base: str | None = None
    generator: str | None = None
    encoder: str | None = None
    device: str | None = None
    dtype: str | None = None
    n_slots: int | None = None
    r: int | None = None
    deterministic: bool | None = None
    engine: str | None = None
    url: str | None = None
    key: str | None = None
    shared: str | None = None
    vllm_args: str | None = None

    def settings(self, out: Output, sampling: SamplingFlags | None = None) -> Settings:
        """The settings in force with these flags."""
        from dnd_sdk.settings import load_settings

        settings = load_settings(home=out.home, **vars(self), **vars(sampling or SamplingFlags()))
        for name, engine in ENGINE_OF.items():
            if getattr(self, name) is not None and settings.engine != engine:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} is for the engine {engine}", fix=f"say --engine {engine}, or leave it out")
        return settings

    def load(self, out: Output) -> DnD:
        """The session over these models; says on stderr that it is loading."""
        settings = self.settings(out)  # before the slow part
        with out.step("loading the base model") as note, uncollected():
            from dnd_sdk.session import DnD

            quiet_libraries(out)
            return DnD.load(**settings.load_arguments(), progress=note)


@dataclass(frozen=True)
class ServerOptions:
    """Whether the server that runs for the home may answer."""

    no_server: bool = False


@dataclass(frozen=True)
class WorkerOptions:
    """Who works beside this process; None: nobody."""

    ray: str | None = None
    workers: int | None = None

    @contextmanager
    def start(self, out: Output) -> Iterator[Workers | None]:
        """The workers until the block ends; None without `--ray`.

        `OMP_NUM_THREADS` says with how many threads each computes. Raises `ConfigError` for options that contradict
        each other, `MissingExtraError` without Ray, `WorkerError` without a cluster.
        """
        if self.ray is None:
            if self.workers is not None:
                raise ConfigError("--workers is for Ray", fix="say --ray local, too, or leave it out")
            yield None
            return
        from dnd_sdk.integrations.ray import RayWorkers

        threads = os.environ.get("OMP_NUM_THREADS", "")
        n_threads = int(threads) if threads.isdecimal() and int(threads) else None
        with ExitStack() as stack:
            with out.step("starting the workers"):
                n_workers = 2 if self.workers is None else self.workers
                workers = stack.enter_context(RayWorkers(self.ray, n_workers, n_threads=n_threads))
            yield workers


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the garbage collector out of the block, and what the block made out of the collector's sight for good.

    For the first import of the model libraries: they make some 400,000 objects that stay, and looking through them
    again and again takes an eighth of the start. Where they are loaded already, nothing is held back.
    """
    if "transformers" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def quiet_libraries(out: Output) -> None:
    """Keep other libraries' bars off the terminal (we draw our own); `--debug` lets our log through."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if out.debug or os.environ.get("DND_DEBUG"):
        logging.basicConfig(format="%(asctime)s %(name)s %(message)s")
        logging.getLogger("dnd_sdk").setLevel(logging.DEBUG)


def _option(
    name: str, kind: Any, default: Any, *flags: str, panel: str | None, text: str, hidden: bool = False
) -> inspect.Parameter:
    option = typer.Option(*flags, help=text, rich_help_panel=panel, show_default=bool(default), hidden=hidden)
    annotation = Annotated[kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


GROUPS: dict[type, tuple[inspect.Parameter, ...]] = {
    TaskSet: (
        _option(
            "task_set",
            str | None,
            None,
            "--set",
            panel=None,
            text=f"{DEFAULT_SET} (default), train or all; all where no task names its role.",
        ),
        _option("role", str | None, None, "--role", panel=None, text="Earlier name of --set.", hidden=True),
    ),
    ModelOptions: (
        _option("base", str | None, None, "--base", panel=MODEL, text="Base LLM: embedded name, folder or hub id."),
        _option("generator", str | None, None, "--generator", panel=MODEL, text="Generator folder."),
        _option("encoder", str | None, None, "--encoder", panel=MODEL, text="Prompt encoder: name, folder or hub id."),
        _option("device", str | None, None, "--device", panel=MODEL, text="auto, cpu, cuda, cuda:N or mps."),
        _option("dtype", str | None, None, "--dtype", panel=MODEL, text="auto, float32, bfloat16 or float16."),
        _option("n_slots", int | None, None, "--n-slots", panel=MODEL, text="How many adapters stay swapped in."),
        _option("r", int | None, None, "--r", panel=MODEL, text="Rank of their slots; the generator's unless set."),
        _option(
            "deterministic",
            bool | None,
            None,
            "--deterministic/--no-deterministic",
            panel=MODEL,
            text="Let no answer depend, by a rounding, on what runs beside it; slower.",
        ),
        _option(
            "engine",
            str | None,
            None,
            "--engine",
            panel=MODEL,
            text="embedded (default), vllm: a server's, or vllm-local: one here.",
        ),
        _option("url", str | None, None, "--url", panel=MODEL, text="Of the vLLM server."),
        _option(
            "key", str | None, None, "--key", panel=MODEL, text="Its --api-key; better as DND_KEY: flags are seen."
        ),
        _option("shared", str | None, None, "--shared", panel=MODEL, text="Where it sees the home; at the same path."),
        _option(
            "vllm_args", str | None, None, "--vllm-args", panel=MODEL, text="Options of vllm-local, as of vllm serve."
        ),
    ),
    ServerOptions: (
        _option(
            "no_server", bool, False, "--no-server", panel=MODEL, text="Load models here, even where a server runs."
        ),
    ),
    WorkerOptions: (
        _option(
            "ray",
            str | None,
            None,
            "--ray",
            panel=WORKERS,
            text="Spread the work with Ray: local (processes here), auto (the cluster that runs here) or its address.",
        ),
        _option("workers", int | None, None, "--workers", panel=WORKERS, text="How many; 2 unless set."),
    ),
    SamplingFlags: (
        _option(
            "max_new_tokens",
            int | None,
            None,
            "--max-new-tokens",
            panel=SAMPLING,
            text=f"Upper bound on the answer's tokens; {SamplingOptions.max_new_tokens} unless set.",
        ),
        _option("temperature", float | None, None, "--temperature", panel=SAMPLING, text="0 (default) is greedy."),
        _option("top_p", float | None, None, "--top-p", panel=SAMPLING, text="Nucleus mass, when temperature > 0."),
        _option(
            "top_k", int | None, None, "--top-k", panel=SAMPLING, text="Most likely tokens to choose from; 0: all."
        ),
        _option("min_p", float | None, None, "--min-p", panel=SAMPLING, text="Least share of the likeliest's chance."),
        _option(
            "repetition_penalty",
            float | None,
            None,
            "--repetition-penalty",
            panel=SAMPLING,
            text="Above 1: says less again.",
        ),
        _option("seed", int | None, None, "--seed", panel=SAMPLING, text="Makes sampling repeatable."),
        _option(
            "stop", list[str] | None, None, "--stop", panel=SAMPLING, text="Cut the answer before this; repeatable."
        ),
    ),
    Output: (
        _option("json", bool, False, "--json", panel=GENERAL, text="Print one JSON object."),
        _option("quiet", bool, False, "--quiet", "-q", panel=GENERAL, text="No notes; names only."),
        _option(
            "home", Path | None, None, "--home", panel=GENERAL, text="Folder for adapters and weights (also DND_HOME)."
        ),
        _option("debug", bool, False, "--debug", panel=GENERAL, text="Show tracebacks and logs (also DND_DEBUG)."),
    ),
}


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Replace every parameter whose annotation is a group by the group's options."""
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    groups = {p.name: p.annotation for p in parameters if p.annotation in GROUPS}
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters if p.name not in groups]

    @functools.wraps(function)
    def wrapper(**values: Any) -> None:
        built = {name: kind(**{p.name: values.pop(p.name) for p in GROUPS[kind]}) for name, kind in groups.items()}
        function(**values, **built)

    # innermost groups last in the help: the command's own options come first
    listed = own + [p for kind in GROUPS if kind in groups.values() for p in GROUPS[kind]]
    wrapper.__signature__ = inspect.Signature(listed)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in listed}
    return wrapper
