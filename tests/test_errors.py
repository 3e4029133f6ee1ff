"""Messages: whatever an error is told, it says it in under 2 kB that can be printed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnd_sdk.errors import AdapterCorruptError, DndError, InputError


def n_bytes(text: str) -> int:
    return len(text.encode())


def test_short_messages_stay_as_they_are() -> None:
    error = InputError("a 'b' \n é", fix="do\tthis")
    assert (error.message, error.fix, str(error)) == ("a 'b' \n é", "do\tthis", "a 'b' \n é\n  fix: do\tthis")
    assert error.args == ("a 'b' \n é",)


@pytest.mark.parametrize("long", ["x" * 70_000, str(tuple(range(100_000))), "é " * 50_000, "\U0001f600" * 9_000])
def test_long_messages_keep_where_and_what(long: str) -> None:
    error = AdapterCorruptError(
        f"/in/adapter_model.safetensors: tensor {long} is I32, expected F32", fix=f"rm {long} now"
    )
    assert error.message.startswith("/in/adapter_model.safetensors: tensor ") and error.message.endswith("expected F32")
    assert error.fix is not None and error.fix.startswith("rm ") and error.fix.endswith(" now")
    assert "left out" in error.message and n_bytes(str(error)) < 2000 and error.args == (error.message,)


def test_several_long_names_leave_the_words_between_them() -> None:
    a, b = "a" * 5000, "b" * 5000
    error = DndError(f"tensor {a} and tensor {b} are twice there")
    assert " and tensor b" in error.message and error.message.endswith("b are twice there")


def test_what_cannot_be_printed_is_escaped() -> None:
    assert DndError("a\ud800b \x1b[31m").message == "a\\ud800b \\x1b[31m"


@given(st.text(st.characters(), max_size=200), st.integers(1, 400))
def test_any_text(text: str, times: int) -> None:
    error = DndError(text * times, fix=text * times)
    assert n_bytes(str(error)) < 2000
