"""Messages to token ids: the base's chat template applied exactly once, everything checked before the model runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dnd_sdk.errors import InputError

Messages = str | Sequence[Mapping[str, str]]
"""A chat, oldest message first; a plain string is one user message."""


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Token ids of the chat up to where the answer begins.

    A tokenizer without a chat template gets the bare contents and its own special tokens.
    Raises `InputError` for messages that are malformed, empty or refused by the template.
    """
    chat = [{"role": "user", "content": messages}] if isinstance(messages, str) else _checked(messages)
    if tokenizer.chat_template is None:
        ids = _tokenise(tokenizer, "\n\n".join(m["content"] for m in chat), add_special_tokens=True)
    else:
        # the template writes the special tokens itself
        ids = _tokenise(tokenizer, _render(tokenizer, chat), add_special_tokens=False)
    if not ids:
        raise InputError("the prompt has no tokens", fix="pass some text")
    return ids


def option_ids(tokenizer: PreTrainedTokenizerBase, option: str) -> list[int]:
    """Token ids of an answer, end of turn included when the tokenizer has one."""
    ids = _tokenise(tokenizer, option, add_special_tokens=False)
    return ids if tokenizer.eos_token_id is None else [*ids, int(tokenizer.eos_token_id)]


def _checked(messages: Any) -> list[dict[str, str]]:
    if not messages:
        raise InputError("no messages", fix="pass a string or a list of {'role', 'content'}")
    for i, m in enumerate(messages):
        if not isinstance(m, Mapping) or not all(isinstance(m.get(k), str) for k in ("role", "content")):
            raise InputError(f"message {i} is not a {{'role', 'content'}} of two strings: {str(m)[:80]!r}")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _render(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]]) -> str:
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    except TemplateError as e:
        raise InputError(f"the base's chat template refuses these messages: {e}") from e


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
