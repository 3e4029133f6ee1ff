"""What peft's own tests ask of hot-swaps and mixed batches, asked of the engine; expected values are plain peft's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_parts import PROMPTS, ask, ask_all, peft_model, strong, tiny_base, tiny_layout
from helpers import SAME_MATHS, random_flat, tiny_model
from peft_rivals import IDS, LAYOUT, A, B, Ours, Peft, fresh, logits

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.config import Home, SamplingOptions
from dnd_sdk.engine import CompletionRequest, Engine
from dnd_sdk.errors import AdapterNotFoundError, InputError
from dnd_sdk.lora import LoraLayout, widened

# hot-swaps


@pytest.mark.parametrize("rival", [Ours, Peft])
def test_there_and_back_equals_fresh_loads(rival: type[Ours] | type[Peft]) -> None:
    """One name, weights A, then B, then A again."""
    made = rival()
    made.load("x", A)
    for flat in (A, B, A):
        made.swap("x", flat)
        torch.testing.assert_close(made.logits("x"), fresh(flat), **SAME_MATHS)


def test_there_and_back_is_bit_identical_through_one_slot() -> None:
    made = Ours(n_slots=1)
    seen = []
    for name, flat in (("a", A), ("b", B), ("a", A)):
        made.load(name, flat)
        seen.append(made.logits(name))
    assert torch.equal(seen[0], seen[2]) and not torch.allclose(seen[0], seen[1], atol=1e-2)


@pytest.mark.parametrize("ranks", [(7, 13), (13, 7)])
def test_ranks_of_a_pair_in_a_bank_of_the_larger(ranks: tuple[int, int], tmp_path: Path) -> None:
    """Through the store, as a session brings them: a smaller rank is padded, its scaling stays its own."""
    base = tiny_base()
    bank_layout = LoraLayout.from_model(base.model, r=13, lora_alpha=26)
    layouts = [LoraLayout.from_model(base.model, r=r, lora_alpha=2 * r) for r in ranks]
    flats = [random_flat(layout, seed=r) for layout, r in zip(layouts, ranks, strict=True)]
    want = [peft_model(base, layout, f)(input_ids=IDS).logits for layout, f in zip(layouts, flats, strict=True)]
    store = AdapterStore(Home(tmp_path))
    about: dict[str, Any] = {"base_name": base.name, "base_fingerprint": base.fingerprint, "source": "imported"}
    ids = [store.put(f, layout, **about).id for layout, f in zip(layouts, flats, strict=True)]
    engine = Engine(base, bank_layout, n_slots=1, fetch=lambda i: store.load_by_id(i, bank_layout))
    for which in (0, 1, 0):
        torch.testing.assert_close(logits(engine, [ids[which]] * len(IDS)), want[which], **SAME_MATHS)


def test_a_rank_that_is_padded_computes_the_same() -> None:
    small = LoraLayout.from_model(tiny_model(), r=7, lora_alpha=14)
    wide = small.at_rank(13)
    flat = random_flat(small)
    base = tiny_base()
    want = peft_model(base, small, flat)(input_ids=IDS).logits
    engine = Engine(base, wide)
    engine.bank.load("x", torch.as_tensor(widened(flat, small, wide)))
    torch.testing.assert_close(logits(engine, ["x"] * len(IDS)), want, **SAME_MATHS)


def test_an_adapter_of_fewer_targets_leaves_the_others_plain(tmp_path: Path) -> None:
    """After one that has all: nothing of it may stay in the slot."""
    base = tiny_base()
    layout, part = tiny_layout(base), LoraLayout.from_model(base.model, r=4, lora_alpha=12, target_modules=["q_proj"])
    flat = random_flat(part, std=0.2)
    want = peft_model(base, part, flat)(input_ids=IDS).logits
    store = AdapterStore(Home(tmp_path))
    about: dict[str, Any] = {"base_name": base.name, "base_fingerprint": base.fingerprint, "source": "imported"}
    stored = store.put(flat, part, **about)
    engine = Engine(base, layout, n_slots=1, fetch=lambda i: store.load_by_id(i, layout))
    engine.bank.load("all", A)
    torch.testing.assert_close(logits(engine, [stored.id] * len(IDS)), want, **SAME_MATHS)


# mixed batches


def test_every_third_row_is_the_bases_or_an_adapters() -> None:
    made = Ours()
    plain = made.base.model(IDS).logits
    made.load("adapter0", A)
    made.load("adapter1", B)
    mixed = made.mixed([None, "adapter0", "adapter1"] * 3)
    assert torch.equal(mixed[::3], plain[::3])
    torch.testing.assert_close(mixed[1::3], fresh(A)[1::3], **SAME_MATHS)
    torch.testing.assert_close(mixed[2::3], fresh(B)[2::3], **SAME_MATHS)


def test_every_third_answer_is_as_alone() -> None:
    """The same through `complete`, prompts of different lengths together."""
    made, options = Ours(), SamplingOptions(max_new_tokens=6)
    made.load("adapter0", strong(LAYOUT, 1))
    made.load("adapter1", strong(LAYOUT, 2))
    chats = [f"{PROMPTS[i % 5]} {i}" for i in range(9)]
    names = [None, "adapter0", "adapter1"] * 3
    together = ask_all(made.engine, chats, names, options)
    assert together == [ask(made.engine, chat, name, options) for chat, name in zip(chats, names, strict=True)]
    assert len({g.text for g in together}) > 3


def test_adapters_of_different_targets_share_a_batch(tmp_path: Path) -> None:
    base = tiny_base()
    layout = tiny_layout(base)
    parts = [LoraLayout.from_model(base.model, r=4, lora_alpha=12, target_modules=[t]) for t in ("v_proj", "up_proj")]
    flats = [random_flat(p, seed=i, std=0.2) for i, p in enumerate(parts)]
    want = [peft_model(base, p, f)(input_ids=IDS).logits for p, f in zip(parts, flats, strict=True)]
    plain = base.model(IDS).logits
    store = AdapterStore(Home(tmp_path))
    about: dict[str, Any] = {"base_name": base.name, "base_fingerprint": base.fingerprint, "source": "imported"}
    ids = [store.put(f, p, **about).id for p, f in zip(parts, flats, strict=True)]
    engine = Engine(base, layout, fetch=lambda i: store.load_by_id(i, layout))
    mixed = logits(engine, [None, *ids] * 3)
    assert torch.equal(mixed[::3], plain[::3])
    for row, expected in enumerate(want, 1):
        torch.testing.assert_close(mixed[row::3], expected[row::3], **SAME_MATHS)


def test_as_many_adapters_as_prompts_and_only_known_ones() -> None:
    """A request carries its adapter, so that there are no two lists to differ; where there are, both are counted."""
    made, options = Ours(), SamplingOptions(max_new_tokens=2)
    made.load("a", A)
    with pytest.raises(InputError):
        made.engine.option_logprobs(["x", "y"], ["a"], ["yes", "no"])
    before = ask(made.engine, "x", "a", options)
    with pytest.raises(AdapterNotFoundError, match="'nope'"):
        ask_all(made.engine, ["x", "y"], ["a", "nope"], options)
    with pytest.raises(AdapterNotFoundError, match="'nope'"):
        next(made.engine.stream(CompletionRequest("x", "nope", options)))
    assert ask(made.engine, "x", "a", options) == before and made.engine.bank.resident() == ["a"]
