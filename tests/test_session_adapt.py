"""`DnD.adapt` on a tiny real installation: what is decided, generated, stored and found again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from session_parts import logits
from tiny_world import World, prompts_of

from dnd_sdk.adaptation.results import STEPS
from dnd_sdk.errors import ConfigError, GeneratorError
from dnd_sdk.session import DnD


@pytest.fixture
def dnd(world: World) -> DnD:
    return world.session()


def test_new_prompts_generate_store_and_swap_in(dnd: DnD) -> None:
    result = dnd.adapt(prompts_of("upper"), name="upper")
    assert (result.decision, result.n_prompts, result.notes) == ("generate", 20, ())
    assert result.adapter is not None and result.adapter == dnd.store.get("upper")
    assert result.adapter.id in dnd.engine.bank.resident()
    assert set(result.timings_s) == set(STEPS)
    assert all(result.timings_s[s] > 0 for s in STEPS)
    assert sum(v for k, v in result.timings_s.items() if k != "total") <= result.timings_s["total"]
    assert not torch.equal(logits(dnd), logits(dnd, result.adapter.id))


def test_the_stored_weights_are_what_the_generator_gives(dnd: DnD) -> None:
    adapter = dnd.adapt(prompts_of("digits")).adapter
    assert adapter is not None and dnd.generator is not None
    states = dnd.encoder.encode(prompts_of("digits"), state_tokens=dnd.generator.state_tokens).states
    assert torch.equal(dnd.store.load(adapter, dnd.layout), dnd.generator.generate(states))


def test_the_same_prompts_are_reused_without_encoding(dnd: DnD, monkeypatch: pytest.MonkeyPatch) -> None:
    made = dnd.adapt(prompts_of("upper"))
    monkeypatch.setattr(dnd.encoder, "encode", lambda *a, **k: pytest.fail("encoded"))
    again = dnd.adapt(list(reversed(prompts_of("upper"))), name="unused")
    assert (again.decision, again.score, again.adapter) == ("reuse", 1.0, made.adapter)
    assert again.timings_s["encode"] == again.timings_s["generate"] == 0.0
    assert again.timings_s["total"] < 0.25


def test_other_prompts_of_a_task_reuse_and_another_task_generates(world: World) -> None:
    dnd = world.session(reuse=0.99)
    made = dnd.adapt(prompts_of("lower", 20))
    near = dnd.adapt([f"the cat {i} sat on it" for i in range(40, 60)])
    assert (near.decision, near.adapter) == ("reuse", made.adapter)
    assert near.score is not None and near.neighbours[0] == (made.adapter.name, near.score)
    assert dnd.adapt(prompts_of("upper")).decision == "generate"


def test_a_new_process_reuses_what_another_one_made(world: World) -> None:
    made = world.session().adapt(prompts_of("upper"))
    again = world.session().adapt(prompts_of("upper"))
    assert (again.decision, again.adapter) == ("reuse", made.adapter)


def test_modes(dnd: DnD) -> None:
    nothing = dnd.adapt(prompts_of("upper"), mode="reuse")
    assert (nothing.decision, nothing.adapter, nothing.score) == ("base", None, None)
    made = dnd.adapt(prompts_of("upper"), mode="generate")
    forced = dnd.adapt(prompts_of("upper"), mode="generate")
    assert (forced.decision, forced.adapter) == ("generate", made.adapter)
    assert len(dnd.store.ls()) == 1
    with pytest.raises(ConfigError, match="mode must be one of auto, reuse, generate"):
        dnd.adapt(prompts_of("upper"), mode="base")  # type: ignore[arg-type]


def test_without_a_generator_adapt_reuses_or_stays_on_the_base(world: World) -> None:
    made = world.session().adapt(prompts_of("upper"))
    plain = world.session(generator=False)
    assert plain.adapt(prompts_of("upper")).adapter == made.adapter
    other = plain.adapt(prompts_of("digits"))
    assert (other.decision, other.adapter) == ("base", None)
    assert "there is no generator for" in other.reason
    with pytest.raises(GeneratorError, match="there is no generator"):
        plain.adapt(prompts_of("digits"), mode="generate")


def test_one_prompt_and_very_many_prompts_are_fine(dnd: DnD) -> None:
    one = dnd.adapt(["only one"])
    assert (one.decision, one.n_prompts) == ("generate", 1)
    many = dnd.adapt([f"prompt {i}" for i in range(100_000)])
    assert (many.n_prompts, many.notes) == (512, ("read 100000 prompts, sampled 512",))


def test_imported_adapters_are_found_by_their_prompts(dnd: DnD, tmp_path: Path) -> None:
    made = dnd.adapt(prompts_of("upper"), name="upper").adapter
    dnd.store.export("upper", tmp_path / "out")
    (tmp_path / "out" / "dnd.json").unlink()
    flat = dnd.store.load(made, dnd.layout)
    dnd.store.rm("upper")
    back = dnd.import_adapter(tmp_path / "out", name="back", prompts=prompts_of("upper"))
    assert (back.source, back.encoder, back.encoder_fingerprint) == (
        "imported",
        dnd.encoder.name,
        dnd.encoder.fingerprint,
    )
    assert torch.equal(dnd.store.load(back, dnd.layout), flat)
    assert dnd.route(prompts_of("upper")).adapter == back
    assert dnd.complete("hello", adapter="back", max_new_tokens=5).adapter == "back"
