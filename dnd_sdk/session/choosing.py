"""Who answers a prompt, and what the engine is asked for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dnd_sdk.adaptation import Parts, check_made_for
from dnd_sdk.adapters import Adapter
from dnd_sdk.chat import Prompt, Tools, checked_schema, last_user_text, with_role
from dnd_sdk.config import SamplingOptions
from dnd_sdk.engine import CompletionRequest
from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.prompts import Role, role_text
from dnd_sdk.routing import RouteDecision, log_decision
from dnd_sdk.session.results import Chosen

if TYPE_CHECKING:
    from torch import Tensor

AUTO = "auto"

AdapterChoice = Adapter | str | None
"""An adapter or its name, `"auto"` (routed by the prompt), or None (the base)."""


class Choosing:
    """How one session chooses."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def request(
        self,
        prompt: Prompt,
        adapter: AdapterChoice,
        role: Role | None,
        tools: Tools | None,
        options: SamplingOptions,
    ) -> tuple[CompletionRequest, Chosen]:
        """What the engine is asked, its adapter resident, and who that is."""
        chosen = self.choose(prompt, adapter, role, tools)
        if chosen.adapter is not None:
            self._parts.make_resident(chosen.adapter)
        return asked(prompt, chosen, role, tools, options), chosen

    def choose(self, prompt: Prompt, adapter: AdapterChoice, role: Role | None, tools: Tools | None) -> Chosen:
        """Whom the caller named, checked, or whom the router picks."""
        if adapter is None:
            return Chosen(None)
        check_choice(adapter)
        if adapter == AUTO:
            return self._routed(last_user_text(prompt), role, tools)
        found = adapter if isinstance(adapter, Adapter) else self._parts.store.get(adapter)
        check_made_for(found, self._parts.base)
        return Chosen(found)

    def pooled(self, prompts: Sequence[str], role: Role | None = None) -> Tensor:
        """Vectors `(n, C)` of the prompts, each under the role."""
        texts = prompts if role is None else [role.condition(p) for p in prompts]
        return self._parts.encoder.embed(texts)

    def _routed(self, text: str, role: Role | None, tools: Tools | None) -> Chosen:
        if tools:
            reason = "tools are on offer, and adapters seldom leave them alone; name one to have it all the same"
            route = RouteDecision("base", None, None, [], reason, by="tools")
        else:
            route = self._parts.router.route_one(self.pooled([text], role), role_text(role))
        log_decision(self._parts.log, self._parts.router.thresholds, "auto", [text], route)
        return Chosen(route.adapter, route.score)


def asked(
    prompt: Prompt, chosen: Chosen, role: Role | None, tools: Tools | None, options: SamplingOptions
) -> CompletionRequest:
    """The prompt as a request of whom was chosen, under `role` or its own."""
    own = chosen.adapter
    chat = with_role(prompt, role, None if own is None else own.role)
    return CompletionRequest(chat, None if own is None else own.id, options, tools)


def check_choice(adapter: object) -> None:
    """Raise `InputError` unless it is an `AdapterChoice`."""
    if not isinstance(adapter, Adapter | str | None):
        raise InputError(f"adapter must be an Adapter, a name or None, got {type(adapter).__name__}")


def sampling_options(sampling: dict[str, Any]) -> SamplingOptions:
    """The options of a call; raises `ConfigError` for one that there is not or that is out of range."""
    if sampling.get("schema") is not None:
        sampling = {**sampling, "schema": checked_schema(sampling["schema"])}
    try:
        return SamplingOptions(**sampling)
    except TypeError as e:
        known = ", ".join(SamplingOptions.__dataclass_fields__)
        raise ConfigError(f"unknown sampling option: {e}", fix=f"use {known}") from e


def of_row(options: SamplingOptions, row: int) -> SamplingOptions:
    """A batch's options for one of its rows: with one seed, rows that ask the same still draw apart."""
    return options if options.seed is None else replace(options, seed=options.seed + row)
