"""`dnd run`, `dnd chat` and `dnd route`: text in, text (or the routing decision) out."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dnd_sdk.cli.completion import adapter_choices
from dnd_sdk.cli.options import (
    ModelOptions,
    RoleFile,
    SamplingFlags,
    SchemaOption,
    read_role_option,
    read_schema_option,
)
from dnd_sdk.cli.output import Output, confidence, read_text
from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError, DndError

if TYPE_CHECKING:
    from dnd_sdk.adapters import AdapterStore
    from dnd_sdk.prompts import Role
    from dnd_sdk.session import Completion, CompletionStream, DnD

BASE = "base"

AdapterOption = Annotated[
    str,
    typer.Option("--adapter", "-a", help="Adapter name, auto (routed) or base.", autocompletion=adapter_choices),
]


def run(
    out: Output,
    models: ModelOptions,
    sampling: SamplingFlags,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The prompt, or - for stdin.")],
    adapter: AdapterOption = "auto",
    role: RoleFile = None,
    schema: SchemaOption = None,
    compare: Annotated[str | None, typer.Option("--compare", help="base: also show the base model's answer.")] = None,
) -> None:
    """Answer one prompt with an adapter, a routed one, or the base model; under --role, else the adapter's own role."""
    from dnd_sdk.adapters import AdapterStore

    if compare not in (None, BASE):
        raise ConfigError(f"--compare takes {BASE!r}, got {compare!r}", fix="leave it out or write --compare base")
    prompt = read_text(text)
    settings = models.settings(out, sampling)
    store = AdapterStore(Home.find(settings.home))
    chosen = _known(store, adapter, settings.base)  # before the slow part
    # the adapter's own role holds for the base it is compared with, too; routing never picks one that brings a role
    under = read_role_option(role) or (None if chosen in (None, "auto") else store.get(chosen).role)
    options = {**settings.sampling(), "schema": read_schema_option(schema)}
    with models.load(out) as dnd:
        if out.json or compare:
            answer = dnd.complete(prompt, adapter=chosen, role=under, **options)
            other = dnd.complete(prompt, adapter=None, role=under, **options) if compare else None
            out.emit(_payload(answer, other), lambda: _text(answer, other))
        else:
            answer = _stream(dnd.stream(prompt, adapter=chosen, role=under, **options), out)
    out.note(f"[{answer.adapter or BASE}, {answer.usage['completion_tokens']} tokens]")


def chat(
    out: Output, models: ModelOptions, sampling: SamplingFlags, adapter: AdapterOption = BASE, role: RoleFile = None
) -> None:
    """Talk to the model. /adapter NAME switches, /base goes back, /exit or Ctrl-D leaves, Ctrl-C stops an answer."""
    from dnd_sdk.adapters import AdapterStore

    settings, under = models.settings(out, sampling), read_role_option(role)
    chosen = _known(AdapterStore(Home.find(settings.home)), adapter, settings.base)
    with models.load(out) as dnd:
        talk = Conversation(dnd, out, chosen, settings.sampling(), under)
        out.note("/adapter NAME, /base, /exit; Ctrl-C stops an answer")
        while talk.turn():
            pass
    out.emit({"messages": talk.messages, "adapter": talk.adapter}, "")


def route(
    out: Output,
    models: ModelOptions,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="A prompt, or - for stdin (one prompt a line).")],
    role: RoleFile = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show the nearest adapters and the reason.")] = False,
) -> None:
    """Show which adapter would serve a prompt, without making or changing anything."""
    prompts = [line for line in read_text(text).splitlines() if line.strip()] if text == "-" else [read_text(text)]
    under = read_role_option(role)
    with models.load(out) as dnd:
        decision = dnd.route(prompts, role=under)
    payload: dict[str, Any] = {
        "decision": decision.decision,
        "score": decision.score,
        "adapter": decision.adapter.name if decision.adapter else None,
        "neighbours": [{"name": n, "score": s} for n, s in decision.neighbours],
        "reason": decision.reason,
    }
    if explain:
        payload |= {"probability": decision.probability, "in_distribution": decision.in_distribution}
    lines = [f"{decision.decision} {payload['adapter'] or ''}".strip()]
    if explain and not out.quiet:
        sure = confidence(decision.probability, decision.in_distribution)
        lines += [f"reason: {decision.reason}", *([f"sure:   {sure}"] if sure else [])]
        lines += [f"near:   {n}  {s:.3f}" for n, s in decision.neighbours]
    out.emit(payload, "\n".join(lines))


class Conversation:
    """What was said, and who answers."""

    def __init__(self, dnd: DnD, out: Output, adapter: str | None, sampling: dict[str, Any], role: Role | None) -> None:
        self.dnd, self.out, self.adapter, self.sampling, self.role = dnd, out, adapter, sampling, role
        self.messages: list[dict[str, str]] = []

    def turn(self) -> bool:
        """Read one line and act on it; False ends the conversation."""
        if sys.stdin.isatty():
            typer.echo(f"{self.adapter or BASE}> ", nl=False, err=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            typer.echo(err=True)
            return True
        if not line or line.strip() == "/exit":
            return False
        try:
            self._act(line.strip())
        except DndError as error:  # a bad line must not end the conversation
            typer.echo(f"error: {error}", err=True)
        return True

    def _act(self, line: str) -> None:
        if line == "/base":
            self.adapter = None
        elif line.startswith("/adapter"):
            self.adapter = self._switched(line.removeprefix("/adapter").strip() or "auto")
        elif line.startswith("/"):
            raise ConfigError(f"unknown command {line.split()[0]}", fix="use /adapter NAME, /base or /exit")
        elif line:
            self._answer(line)

    def _switched(self, name: str) -> str | None:
        from dnd_sdk.adaptation import check_made_for

        chosen = _known(self.dnd.store, name, self.dnd.base.name)
        if chosen not in (None, "auto"):
            check_made_for(self.dnd.store.get(chosen), self.dnd.base)
        return chosen

    def _answer(self, line: str) -> None:
        asked = [*self.messages, {"role": "user", "content": line}]
        stream = self.dnd.stream(asked, adapter=self.adapter, role=self.role, **self.sampling)
        try:
            answer = _stream(stream, self.out)
        except KeyboardInterrupt:
            self.out.note("\n[stopped, not kept in the conversation]")
            return
        self.messages = [*asked, {"role": "assistant", "content": answer.text}]


def _stream(stream: CompletionStream, out: Output) -> Completion:
    """Print an answer as it is made."""
    with stream:  # whatever happens, the thread that makes the answer ends
        for piece in stream:
            if not out.json:
                out.piece(piece)
        if not out.json:
            out.piece("\n")
        return stream.result


def _known(store: AdapterStore, adapter: str, base: str) -> str | None:
    """`base` is None, `auto` stays, a name must be in the store (`AdapterNotFoundError`) and not another base's."""
    from dnd_sdk.adaptation import check_known_base

    if adapter == BASE:
        return None
    if adapter == "auto":
        return adapter
    found = store.get(adapter)
    check_known_base(found, base)
    return found.name


def _payload(answer: Completion, other: Completion | None) -> dict[str, Any]:
    payload = {"text": answer.text, "adapter": answer.adapter, "decision": answer.decision, "usage": answer.usage}
    return payload if other is None else {**payload, "base": {"text": other.text}}


def _text(answer: Completion, other: Completion | None) -> str:
    if other is None:
        return answer.text
    return f"--- {answer.adapter or BASE}\n{answer.text}\n--- {BASE}\n{other.text}"
