"""Generated weights are vetted and calibrated in their turn: nobody runs the model at the same moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from engine_parts import ask, strong, tiny_base, tiny_layout
from helpers import random_flat

from dnd_sdk.adaptation import LabelCalibration
from dnd_sdk.adaptation.answer_start import AnswerStart
from dnd_sdk.adaptation.vetting import Probe
from dnd_sdk.chat import prompt_ids
from dnd_sdk.config import SamplingOptions
from dnd_sdk.engine import CompletionRequest, Engine, Resident

PROMPTS = [f"Is {7 * i % 13} more than {5 * i % 11}? Say y or n. {'Think. ' * (i % 3)}" for i in range(24)]
LONG = SamplingOptions(max_new_tokens=300)


@pytest.fixture
def engine() -> Engine:
    base = tiny_base()
    made = Engine(base, tiny_layout(base), n_slots=2)
    made.bank.load("a", strong(made.layout, 0))
    with torch.no_grad():  # the stream is to go on for as long as the others work
        base.model.get_output_embeddings().weight[base.tokenizer.eos_token_id] = 0.0
    return made


@pytest.fixture
def at_once(engine: Engine) -> Iterator[list[int]]:
    """How many threads ran the model at every moment that one entered or left it; weights of no slot among them."""
    running, seen, guard = [0], list[int](), threading.Lock()

    def change(by: int) -> None:
        with guard:
            running[0] += by
            seen.append(running[0])

    stack: Any = engine.base.model.base_model
    hooks = [
        stack.register_forward_pre_hook(lambda *_: change(1)),
        stack.register_forward_hook(lambda *_: change(-1), always_call=True),
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def read(resident: Resident) -> list[torch.Tensor]:
    start, rows = AnswerStart(resident), [prompt_ids(resident.base.tokenizer, p) for p in PROMPTS]
    seen = start.reader(random_flat(resident.layout, seed=5), rows)(rows)
    logits = start.logits(seen.hidden)
    return [seen.hidden, seen.x, logits, start.slopes(seen.hidden.mean(0), torch.tensor([3, 7]))]


def vet(resident: Resident) -> list[torch.Tensor]:
    return [torch.tensor(Probe(resident).kl(random_flat(resident.layout, seed=5)))]


def calibrate(resident: Resident) -> list[torch.Tensor]:
    return [LabelCalibration(resident).calibrate(random_flat(resident.layout), PROMPTS, PROMPTS).flat]


@pytest.mark.parametrize("work", [read, vet, calibrate])
def test_while_another_thread_streams_both_come_out_as_alone(
    engine: Engine, at_once: list[int], work: Callable[[Resident], list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dnd_sdk.adaptation.answer_start.BATCH_TOKENS", 128)
    want, told = work(engine), ask(engine, "hi", "a", LONG)
    at_once.clear()
    stream = engine.stream(CompletionRequest("hi", "a", LONG))
    pieces = [next(stream)]
    rounds = 0
    while not engine._scheduler.is_idle:
        for got, expected in zip(work(engine), want, strict=True):
            assert torch.equal(got, expected)
        rounds += 1
    pieces += stream
    assert "".join(pieces) == told.text and rounds > 0
    assert set(at_once) == {0, 1}


def test_a_stream_goes_on_between_two_readings(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    order, calibrating = list[str](), threading.get_ident()
    stack: Any = engine.base.model.base_model

    def note(*_: object) -> None:
        order.append("reading" if threading.get_ident() == calibrating else "token")
        end = time.monotonic() + 20
        while order[-1] == "reading" and not engine.turns.contended:  # until the stream waits for its next token
            assert time.monotonic() < end, "the stream does not want to go on"
            time.sleep(0.001)

    hook = stack.register_forward_pre_hook(note)
    monkeypatch.setattr("dnd_sdk.adaptation.answer_start.BATCH_TOKENS", 1)  # a prompt a time
    stream = engine.stream(CompletionRequest("hi", "a", LONG))
    next(stream)
    read(engine)
    stream.close()
    hook.remove()
    readings = [i for i, what in enumerate(order) if what == "reading"]
    assert len(readings) >= len(PROMPTS)
    assert all(b - a > 1 for a, b in pairwise(readings))


def test_weights_on_trial_are_in_no_slot_and_in_no_other_thread(engine: Engine) -> None:
    ids, flat = torch.tensor([[3, 4, 5]]), strong(engine.layout, 7)
    with engine.running([None]):
        plain = engine.base.model(input_ids=ids).logits
    with engine.trying(flat):
        tried = engine.base.model(input_ids=ids).logits
        elsewhere: list[torch.Tensor] = []
        other = threading.Thread(target=lambda: elsewhere.append(engine.base.model(input_ids=ids).logits))
        other.start()
        other.join()
    engine.bank.load("b", flat)
    with engine.running(["b"]):
        torch.testing.assert_close(tried, engine.base.model(input_ids=ids).logits, rtol=1e-5, atol=2e-5)
    assert engine.bank.evict("b") and engine.bank.resident() == ["a"]
    assert torch.equal(elsewhere[0], plain) and not torch.allclose(tried, plain, atol=0.1)
