"""What a completion is asked: a text or chat messages, with a role in front where there is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dnd_sdk.errors import InputError
from dnd_sdk.prompts import Role, user_text

Prompt = str | Sequence[Mapping[str, Any]]
"""One user message, or chat messages, oldest first; see `chat.template.Messages`."""


def with_role(prompt: Prompt, role: Role | None, own: str | None) -> Prompt:
    """The prompt under `role`, else under its adapter's `own`; a system message of the caller's is never doubled.

    Raises `InputError` when both `role` and the messages say what the system message is.
    """
    text = own if role is None else str(role)
    if text is None or not isinstance(prompt, str | Sequence):  # what is no prompt is refused where it is read
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if any(map(_is_system, messages)):
        if role is not None:
            raise InputError("the messages have a system message already", fix="leave out either it or the role")
        return prompt
    return [{"role": "system", "content": text}, *messages]


def last_user_text(prompt: Prompt) -> str:
    """The prompt, or its user's last message; raises `InputError` when there is none."""
    text = prompt if isinstance(prompt, str) else user_text(prompt)
    if text is None:
        raise InputError("no user message to route by", fix="name an adapter, or add a user message")
    return text


def _is_system(message: object) -> bool:
    said = message.get("role") if isinstance(message, Mapping) else None
    return isinstance(said, str) and said == "system"  # an array compares to many answers
