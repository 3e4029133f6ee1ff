"""`dnd run`, `dnd chat` and `dnd route`: text in, text (or the routing decision) out."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dnd_sdk.cli.answering import AUTO, BASE, answering, check_usable, chosen_by
from dnd_sdk.cli.completion import adapter_choices
from dnd_sdk.cli.options import (
    ModelOptions,
    RoleFile,
    SamplingFlags,
    SchemaOption,
    ServerOptions,
    read_role_option,
    read_schema_option,
)
from dnd_sdk.cli.output import Output, confidence, read_text
from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError, DndError

if TYPE_CHECKING:
    from dnd_sdk.cli.answering import Answering, AnyAnswer, AnyRouted, AnyStream
    from dnd_sdk.prompts import Role

AdapterOption = Annotated[
    str,
    typer.Option("--adapter", "-a", help="Adapter name, auto (routed) or base.", autocompletion=adapter_choices),
]


def run(
    out: Output,
    models: ModelOptions,
    server: ServerOptions,
    sampling: SamplingFlags,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The prompt, or - for stdin.")],
    adapter: AdapterOption = "auto",
    role: RoleFile = None,
    schema: SchemaOption = None,
    compare: Annotated[str | None, typer.Option("--compare", help="base: also show the base model's answer.")] = None,
) -> None:
    """Answer one prompt with an adapter, a routed one, or the base model; under --role, else the adapter's own role."""
    if compare not in (None, BASE):
        raise ConfigError(f"--compare takes {BASE!r}, got {compare!r}", fix="leave it out or write --compare base")
    prompt = read_text(text)
    settings, under, chosen = models.settings(out, sampling), read_role_option(role), chosen_by(adapter)
    options = {**settings.sampling(), "schema": read_schema_option(schema)}
    answer: AnyAnswer
    other: AnyAnswer | None
    with answering(out, models, server, adapter) as dnd:
        if out.json or compare:
            answer, other = dnd.complete(prompt, adapter=chosen, role=under, **options), None
            if compare:
                # the adapter's own role holds for the base, too; routing never picks one that brings a role
                same = under or _role_of(Home.find(settings.home), chosen)
                other = dnd.complete(prompt, adapter=None, role=same, **options)
            out.emit(_payload(answer, other), lambda: _text(answer, other))
        else:
            answer = _stream(dnd.stream(prompt, adapter=chosen, role=under, **options), out)
    out.note(f"[{answer.adapter or BASE}, {answer.usage['completion_tokens']} tokens]")


def chat(
    out: Output,
    models: ModelOptions,
    server: ServerOptions,
    sampling: SamplingFlags,
    adapter: AdapterOption = BASE,
    role: RoleFile = None,
) -> None:
    """Talk to the model. /adapter NAME switches, /base goes back, /exit or Ctrl-D leaves, Ctrl-C stops an answer."""
    settings, under = models.settings(out, sampling), read_role_option(role)
    with answering(out, models, server, adapter) as dnd:
        check_usable(dnd, adapter)
        talk = Conversation(dnd, out, chosen_by(adapter), settings.sampling(), under)
        out.note("/adapter NAME, /base, /exit; Ctrl-C stops an answer")
        while talk.turn():
            pass
    out.emit({"messages": talk.messages, "adapter": talk.adapter}, "")


def route(
    out: Output,
    models: ModelOptions,
    server: ServerOptions,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="A prompt, or - for stdin (one prompt a line).")],
    role: RoleFile = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show the nearest adapters and the reason.")] = False,
) -> None:
    """Show which adapter would serve a prompt, without making or changing anything."""
    from dnd_sdk.routing import decision_fields

    prompts = [line for line in read_text(text).splitlines() if line.strip()] if text == "-" else [read_text(text)]
    under = read_role_option(role)
    decision: AnyRouted
    with answering(out, models, server) as dnd:
        decision = dnd.route(prompts, role=under)
    payload = {**decision_fields(decision), "adapter": decision.adapter.name if decision.adapter else None}
    if not explain:
        del payload["probability"], payload["in_distribution"]
    lines = [f"{decision.decision} {payload['adapter'] or ''}".strip()]
    if explain and not out.quiet:
        sure = confidence(decision.probability, decision.in_distribution)
        lines += [f"reason: {decision.reason}", *([f"sure:   {sure}"] if sure else [])]
        lines += [f"near:   {n}  {s:.3f}" for n, s in decision.neighbours]
    out.emit(payload, "\n".join(lines))


class Conversation:
    """What was said, and who answers."""

    def __init__(
        self, dnd: Answering, out: Output, adapter: str | None, sampling: dict[str, Any], role: Role | None
    ) -> None:
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
            name = line.removeprefix("/adapter").strip() or AUTO
            check_usable(self.dnd, name)
            self.adapter = chosen_by(name)
        elif line.startswith("/"):
            raise ConfigError(f"unknown command {line.split()[0]}", fix="use /adapter NAME, /base or /exit")
        elif line:
            self._answer(line)

    def _answer(self, line: str) -> None:
        asked = [*self.messages, {"role": "user", "content": line}]
        try:
            answer = _stream(self.dnd.stream(asked, adapter=self.adapter, role=self.role, **self.sampling), self.out)
        except KeyboardInterrupt:
            self.out.note("\n[stopped, not kept in the conversation]")
            return
        self.messages = [*asked, {"role": "assistant", "content": answer.text}]


def _stream(stream: AnyStream, out: Output) -> AnyAnswer:
    """Print an answer as it is made."""
    with stream:  # whatever happens, the thread that makes the answer ends
        for piece in stream:
            if not out.json:
                out.piece(piece)
        if not out.json:
            out.piece("\n")
        return stream.result


def _role_of(home: Home, adapter: str | None) -> Role | None:
    """What a named adapter of the home is used under."""
    from dnd_sdk.adapters import AdapterStore
    from dnd_sdk.prompts import as_role

    return None if adapter in (None, AUTO) else as_role(AdapterStore(home).get(adapter).role)


def _payload(answer: AnyAnswer, other: AnyAnswer | None) -> dict[str, Any]:
    payload = {"text": answer.text, "adapter": answer.adapter, "decision": answer.decision, "usage": answer.usage}
    return payload if other is None else {**payload, "base": {"text": other.text}}


def _text(answer: AnyAnswer, other: AnyAnswer | None) -> str:
    if other is None:
        return answer.text
    return f"--- {answer.adapter or BASE}\n{answer.text}\n--- {BASE}\n{other.text}"
