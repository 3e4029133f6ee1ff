"""The `dnd` command: which commands there are, their help, and the one place errors become exit codes.

Nothing here (nor at the top of any command's module) imports torch, so help and completion are quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dnd_sdk import __version__
from dnd_sdk.cli import (
    adapt,
    adapters,
    config,
    doctor,
    engine,
    evaluate,
    gate,
    logs,
    models,
    plot,
    ps,
    run,
    serve,
    store,
    tiers,
    train,
)
from dnd_sdk.cli.options import command
from dnd_sdk.cli.output import error_exit


class DndGroup(TyperGroup):
    """The top command: any exception becomes two lines on stderr (or JSON) and an exit code.

    A command named by two words (`eval paper`) stands beside the one of the first word, which has arguments itself.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Two words first, so that `dnd eval paper` is never a folder called paper (which is `./paper`)."""
        name = " ".join(args[:2])
        return (name, self.commands[name], args[2:]) if name in self.commands else super().resolve_command(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Single words: the shell would quote two."""
        return [item for item in super().shell_complete(ctx, incomplete) if " " not in item.value]

    def main(self, args: Sequence[str] | None = None, *_: Any, **extra: Any) -> Any:
        """Run one command line and exit."""
        argv = list(sys.argv[1:] if args is None else args)
        try:
            # outside standalone mode the parser hands us its usage errors instead of drawing them
            code = super().main(argv, **{**extra, "prog_name": "dnd", "standalone_mode": False})
        except (Exception, KeyboardInterrupt) as error:
            code = error_exit(error, argv)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command; Ctrl-C is reported by us, not by the parser."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise typer.Exit(error_exit(error, [])) from error


def _examples(*lines: str) -> str:
    return "\n".join(("Examples:", *(f"  {line}" for line in lines)))


def _group(text: str) -> typer.Typer:
    return typer.Typer(help=text, no_args_is_help=True, context_settings=CONTEXT, rich_markup_mode="rich")


CONTEXT = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    name="dnd",
    cls=DndGroup,
    no_args_is_help=True,
    context_settings=CONTEXT,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog=_examples(
        "dnd adapt examples/support_tickets/prompts.jsonl --name tickets",
        'dnd run "My card was charged twice" -a tickets --compare base',
        "dnd doctor",
    ),
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"dnd {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Prompts in, a task LoRA out, hot-swapped on one resident LLM."""


app.command("adapt", epilog=_examples(
    "dnd adapt prompts.txt --name tickets",
    "cat prompts.jsonl | dnd adapt - --mode generate --json",
    "dnd adapt requests.jsonl.gz --field body.messages --name requests",
    "dnd adapt prompts.csv --column question --out ./tickets-lora --explain",
    "dnd adapt prompts.txt --role support_agent.md --name support",
    "dnd adapt prompts.txt --mode merge --top-k 3 --explain",
))(command(adapt.adapt))  # fmt: skip
app.command("run", epilog=_examples(
    'dnd run "My card was charged twice" -a tickets',
    'dnd run "My card was charged twice" -a auto --compare base',
    "echo 'What is 2 + 2?' | dnd run - -a base --json",
))(command(run.run))  # fmt: skip
app.command("chat", epilog=_examples("dnd chat", "dnd chat -a tickets"))(command(run.chat))
app.command("route", epilog=_examples(
    'dnd route "My card was charged twice" --explain',
    "cat prompts.txt | dnd route - --json",
))(command(run.route))  # fmt: skip
app.command("serve", epilog=_examples(
    "dnd serve",
    "DND_API_KEY=agents=a-long-secret dnd serve --host 0.0.0.0 --port 8080",
    "curl http://127.0.0.1:8000/v1/models",
))(command(serve.serve))  # fmt: skip
app.command("ps", epilog=_examples("dnd ps", "dnd ps --json"))(command(ps.ps))
app.command("stop", epilog=_examples("dnd stop", "dnd stop --timeout 5"))(command(ps.stop))
app.command("logs", epilog=_examples("dnd logs --since 2h", "dnd logs --replay --json"))(command(logs.logs))

adapters_app = _group("List, inspect, move and check stored adapters.")
adapters_app.command("ls", epilog=_examples("dnd adapters ls", "dnd adapters ls --base smollm2-135m"))(
    command(adapters.ls)
)
adapters_app.command("show", epilog=_examples("dnd adapters show tickets --json"))(command(adapters.show))
adapters_app.command("rm", epilog=_examples("dnd adapters rm tickets"))(command(adapters.rm))
adapters_app.command("import", epilog=_examples(
    "dnd adapters import ./my-peft-lora --name mine --prompts prompts.txt",
))(command(adapters.import_))  # fmt: skip
adapters_app.command("export", epilog=_examples("dnd adapters export tickets ./tickets-lora"))(command(adapters.export))
adapters_app.command("verify", epilog=_examples("dnd adapters verify", "dnd adapters verify tickets --json"))(
    command(adapters.verify)
)
app.add_typer(adapters_app, name="adapters")

train_app = _group("Train the zoo of task LoRAs and the generator that learns from it.")
train_app.command("zoo", epilog=_examples("dnd train zoo examples/tiny_tasks/tasks --out runs/zoo"))(command(train.zoo))
train_app.command("generator", epilog=_examples(
    "dnd train generator examples/tiny_tasks/tasks --zoo runs/zoo --config recipe.toml",
))(command(train.generator))  # fmt: skip
app.add_typer(train_app, name="train")

app.command("eval", epilog=_examples(
    "dnd eval tasks --methods base,generated,shuffled --limit 30",
    "dnd eval tasks --set validation --run-dir runs/eval --json",
    "dnd eval tasks --methods base,icl-3,generated,multitask,oracle --zoo runs/generator --against multitask",
    "dnd eval paper tasks --run-dir runs/paper",
))(command(evaluate.evaluate))  # fmt: skip
app.command("eval paper", epilog=_examples(
    "dnd eval paper tasks --run-dir runs/paper --config examples/paper_cpu.toml",
    "dnd eval paper tasks --run-dir runs/paper --held-out arc_c --held-out obqa --limit 100 --json",
))(command(evaluate.paper))  # fmt: skip
app.command("plot", epilog=_examples("dnd plot eval.json --out plots", "dnd plot gate.json --out plots"))(
    command(plot.plot)
)
bench_app = _group("Measure speed and memory on this machine, and the router on your tasks.")
bench_app.command("train", epilog=_examples("dnd bench train TASKS --config examples/train_cpu.toml"))(
    command(train.bench_train)
)
bench_app.command("adapt", epilog=_examples("dnd bench adapt", "dnd bench adapt --json"))(command(evaluate.bench_adapt))
bench_app.command(
    "gate", epilog=_examples("dnd bench gate tasks", "dnd bench gate tasks --seeds 5 --json > gate.json")
)(command(gate.bench_gate))
bench_app.command("store", epilog=_examples("dnd bench store --sizes 10,100", "dnd bench store --json > store.json"))(
    command(store.bench_store)
)
bench_app.command("engine", epilog=_examples("dnd bench engine --quick", "dnd bench engine --device cuda --json"))(
    command(engine.bench_engine)
)
bench_app.command("serve", epilog=_examples("dnd bench serve", "dnd bench serve --clients 16 --json"))(
    command(serve.bench_serve)
)
bench_app.command(
    "tiers", epilog=_examples("dnd bench tiers --adapters 5000", "dnd bench tiers --replicas 100 --no-affinity --json")
)(command(tiers.bench_tiers))
app.add_typer(bench_app, name="bench")

models_app = _group("The weights dnd works with.")
models_app.command("ls", epilog=_examples("dnd models ls"))(command(models.ls))
models_app.command("pull", epilog=_examples("dnd models pull", "dnd models pull smollm2-135m"))(command(models.pull))
app.add_typer(models_app, name="models")

config_app = _group("Settings: flag > DND_* variable > ./dnd.toml > the user's config.toml > default.")
config_app.command("show", epilog=_examples("dnd config show", "DND_DEVICE=cpu dnd config show --json"))(
    command(config.show)
)
config_app.command("path", epilog=_examples("dnd config path"))(command(config.path))
config_app.command("schema", epilog=_examples("dnd config schema > dnd.schema.json"))(command(config.schema))
config_app.command("init", epilog=_examples("dnd config init", "dnd config init --force"))(command(config.init))
app.add_typer(config_app, name="config")

app.command("doctor", epilog=_examples("dnd doctor", "dnd doctor --json"))(command(doctor.doctor))
app.command("env", epilog=_examples("dnd env", "dnd env --json"))(command(doctor.env))


def main() -> None:
    """Entry point of the `dnd` script."""
    app()


if __name__ == "__main__":
    main()
