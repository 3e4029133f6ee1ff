"""Tokens to text: whole characters, stop strings, end tokens."""

from __future__ import annotations

import pytest
from helpers import read_bytes, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from dnd_sdk.engine.text import RowText

TOK = tiny_tokenizer()


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Characters, and a token for each byte of those it does not know."""
    vocab = {token: i for i, token in enumerate(["<unk>", "a", *(f"<0x{b:02X}>" for b in range(256))])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


FALLBACK = fallback_tokenizer()
END = frozenset([TOK.eos_token_id])


def ids(text: str) -> list[int]:
    return TOK(text, add_special_tokens=False)["input_ids"]


def run(tokens: list[int], stop: tuple[str, ...] = (), chunk: int = 1) -> tuple[list[str], RowText]:
    pieces: list[str] = []
    row = RowText(TOK, END, stop, pieces.append)
    for at in range(0, len(tokens), chunk):
        if row.feed(tokens[at : at + chunk]):
            break
    row.finish()
    return pieces, row


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=30), st.integers(1, 7))
def test_pieces_join_to_the_text(text: str, chunk: int) -> None:
    pieces, row = run(ids(text), chunk=chunk)
    assert "".join(pieces) == row.text == text


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(4, 259), max_size=30))
def test_broken_bytes_decode_as_a_whole(tokens: list[int]) -> None:
    pieces, row = run(tokens)
    assert "".join(pieces) == row.text == read_bytes(TOK.convert_ids_to_tokens(tokens), final=False)


def test_no_piece_has_half_a_character() -> None:
    pieces, _ = run(ids("naïve 🦙 日本"))
    assert "🦙" in pieces and not any("\ufffd" in p for p in pieces)


@settings(deadline=None, max_examples=60)
@given(st.text("abX", max_size=20), st.lists(st.text("abX", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_cuts_before_the_first_and_never_shows_it(text: str, stops: list[str]) -> None:
    pieces, row = run(ids(text), tuple(stops))
    shortest = min((text[: text.index(s)] for s in stops if s in text), key=len, default=text)
    if row.stopped:  # the first stop that was complete wins
        assert any(text.startswith(row.text + s) for s in stops) and len(row.text) >= len(shortest)
    else:
        assert row.text == text and not any(s in text for s in stops)
    assert "".join(pieces) == row.text


def test_a_possible_stop_is_held_back_until_it_is_none() -> None:
    row_pieces, row = run(ids("ab##c"), ("###",))
    assert row_pieces == ["a", "b", "##c"] and row.text == "ab##c"


@pytest.mark.parametrize("chunk", [1, 99])
def test_nothing_after_the_end_token(chunk: int) -> None:
    tokens = [*ids("yes"), TOK.eos_token_id, *ids("junk")]
    _, row = run(tokens, chunk=chunk)
    result = row.result(7)
    assert (result.text, result.completion_tokens, result.finish_reason) == ("yes", 4, "stop")


def test_an_end_token_that_is_not_special_has_no_text() -> None:
    row = RowText(TOK, frozenset(ids("z")))
    assert row.feed(ids("az")) and row.text == "a"


@pytest.mark.parametrize("cancelled", [True, False], ids=["cancelled", "length"])
@pytest.mark.parametrize("n_bytes", [1, 2, 3])
def test_an_answer_cut_inside_a_character_ends_before_it(n_bytes: int, cancelled: bool) -> None:
    pieces: list[str] = []
    row = RowText(TOK, END, (), pieces.append)
    row.feed([*ids("a日"), *ids("🦙")[:n_bytes]])
    if cancelled:
        row.cancel(row.n_tokens)
    result = row.result(1)
    assert result.text == "".join(pieces) == "a日"
    assert result.completion_tokens == 4 + n_bytes


@pytest.mark.parametrize("tok", [TOK, FALLBACK], ids=["byte-level", "byte fallback"])
@pytest.mark.parametrize("char", "éࠀ日퟿\ufffd\U00010000🦙\U0010ffff")
def test_only_an_incomplete_last_character_is_cut(tok: PreTrainedTokenizerFast, char: str) -> None:
    written = tok("a\ufffd", add_special_tokens=False)["input_ids"]
    tokens = tok(char, add_special_tokens=False)["input_ids"]
    assert len(tokens) == len(char.encode()) > 1
    for n in range(len(tokens) + 1):
        row = RowText(tok, frozenset())
        row.feed([*written, *tokens[:n]])
        assert row.result(1).text == "a\ufffd" + (char if n == len(tokens) else ""), n


def test_a_tokenizer_without_bytes_shows_what_the_model_wrote() -> None:
    raw = Tokenizer(models.WordLevel({"\ufffd": 0, "a": 1, "<unk>": 2}, unk_token="<unk>"))
    row = RowText(PreTrainedTokenizerFast(tokenizer_object=raw), frozenset())
    row.feed([1, 0])
    assert row.result(1).text == "a \ufffd"


def test_broken_bytes_before_the_cut_stay() -> None:
    row = RowText(TOK, END)
    row.feed([*ids("a"), ids("🦙")[0], *ids("b"), ids("🦙")[0]])
    assert row.result(1).text == "a\ufffdb"


@pytest.mark.parametrize("chunk", [1, 3, 50])
def test_a_row_takes_as_many_tokens_as_it_may(chunk: int) -> None:
    row, tokens = RowText(TOK, END, max_new_tokens=7), ids("a long answer")
    for at in range(0, len(tokens), chunk):
        row.feed(tokens[at : at + chunk])
    got = row.result(3)
    assert (got.text, got.completion_tokens, got.finish_reason) == ("a long ", 7, "length")


@pytest.mark.parametrize(
    ("at", "text", "reason"),
    [(0, "", "cancelled"), (4, "abcd", "cancelled"), (7, "abcdef", "stop"), (9, "abcdef", "stop")],
)
def test_a_cancel_keeps_what_was_made_and_counts_unless_the_row_ended_before(at: int, text: str, reason: str) -> None:
    row = RowText(TOK, END, max_new_tokens=20)
    row.cancel(at)
    row.feed([*ids("abcdef"), *END, *ids("z" * 12)])
    got = row.result(1)
    assert (got.text, got.completion_tokens, got.finish_reason) == (text, min(at, 7), reason)


def test_a_cancel_after_the_last_token_is_too_late() -> None:
    row = RowText(TOK, END, max_new_tokens=3)
    row.cancel(3)
    row.feed(ids("abcdef"))
    assert row.result(1).finish_reason == "length"
