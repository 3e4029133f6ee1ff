"""Training rows: what is learnt is what serving sends, on bases with and without a chat template."""

from __future__ import annotations

import pytest
from helpers import tiny_tokenizer

from dnd_sdk.chat.template import prompt_ids
from dnd_sdk.tasks.reading import Row, Task
from dnd_sdk.training.batches import tokenise_task

ROWS = tuple(Row(f"question {i}", f"answer {i}", "train") for i in range(20))
TASK = Task("t", "f", "free", (), "exact_match", "train", "MIT", ROWS, ())


@pytest.mark.parametrize("templated", [True, False])
def test_a_row_is_what_serving_sends_then_the_answer_and_end_of_turn(templated: bool) -> None:
    tokenizer = tiny_tokenizer()
    if not templated:
        tokenizer.chat_template = None
    task = tokenise_task(TASK, tokenizer, max_tokens=200, max_rows=20, seed=0)
    assert len(task.rows) == 20
    sent = {tuple(prompt_ids(tokenizer, TASK.messages(r))): r.response for r in ROWS}
    for row in task.rows:
        answer = tokenizer(sent[row.ids[: row.n_prompt]], add_special_tokens=False)["input_ids"]
        assert row.ids[row.n_prompt :] == (*answer, tokenizer.eos_token_id)


def test_a_templated_row_is_the_templates_own_text() -> None:
    tokenizer = tiny_tokenizer()
    row = tokenise_task(TASK, tokenizer, max_tokens=200, max_rows=1, seed=0).rows[0]
    text = tokenizer.decode(row.ids)
    assert text.startswith("<|im_start|>") and text.endswith("<|im_end|>") and "<|im_start|>assistant\nanswer" in text
