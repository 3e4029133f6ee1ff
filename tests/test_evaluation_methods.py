from __future__ import annotations

from pathlib import Path

import pytest
import torch
from eval_fakes import make_parts, make_task
from helpers import random_flat, tiny_model

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.evaluation import Zoo
from dnd_sdk.evaluation.methods import build_methods, conditioning_prompts, donors, instruction
from dnd_sdk.lora_layout import LoraLayout
from dnd_sdk.tasks import Row

TASKS = [make_task(n, n=100) for n in ("alpha", "beta", "gamma", "delta")]


def test_prompts_come_from_the_train_split_alone() -> None:
    task = TASKS[0]
    drawn = conditioning_prompts(task, 0)
    assert len(drawn) == len(set(drawn)) == 64
    assert set(drawn) <= {r.prompt for r in task.train}
    assert drawn == conditioning_prompts(task, 0) != conditioning_prompts(task, 1)


def test_a_prompt_the_test_split_repeats_is_never_shown() -> None:
    leaky = make_task(
        "leaky", train=(Row("a", "yes", "train"), Row("b", "no", "train")), test=(Row("a", "yes", "test"),)
    )
    assert conditioning_prompts(leaky, 0) == ["b"]
    with pytest.raises(InputError, match="'leaky' has no train prompt outside its test split"):
        conditioning_prompts(make_task("leaky", train=(Row("a", "yes", "train"),), test=leaky.test), 0)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_donors_are_a_derangement_for_every_seed(n: int) -> None:
    tasks = [make_task(f"t{i}") for i in range(n)]
    for seed in range(20):
        given = donors(tasks, seed)
        assert all(given[t.name].name != t.name for t in tasks)
        assert {d.name for d in given.values()} == {t.name for t in tasks}
        assert {k: d.name for k, d in given.items()} == {k: d.name for k, d in donors(tasks[::-1], seed).items()}


def test_instructions_name_the_train_labels_only() -> None:
    task = make_task("t", labels=("yes", "no", "only in test"))
    assert instruction(task) == "Answer with exactly one of: yes, no. Answer only."
    assert instruction(make_task("t", answer_type="number")) == "Answer with the number only, no explanation."
    assert instruction(make_task("t", answer_type="short-text")) == "Answer with the answer only, no explanation."


def test_each_method_sees_what_it_may_see() -> None:
    parts = make_parts()
    made = {m.name: m for m in build_methods(["base", "instruction", "generated", "shuffled", "zero"], parts, TASKS)}
    task, own = TASKS[1], {r.prompt for r in TASKS[1].train}
    assert made["base"].make(task, 0) == (None, None)
    assert made["instruction"].make(task, 0).flat is None
    assert torch.equal(made["zero"].make(task, 0).flat, -torch.ones(4))
    assert parts.encoder.seen == []
    generated = made["generated"].make(task, 3).flat
    assert parts.encoder.seen == [conditioning_prompts(task, 3)]
    shuffled = made["shuffled"].make(task, 3).flat
    assert not own & set(parts.encoder.seen[1])
    assert parts.encoder.seen[1] == conditioning_prompts(donors(TASKS, 3)[task.name], 3)
    assert not torch.equal(generated, shuffled)
    assert [made[n].seeded for n in ("base", "instruction", "zero", "generated", "shuffled")] == [False] * 3 + [
        True
    ] * 2


@pytest.mark.parametrize(
    ("names", "changes", "match"),
    [
        (["base", "magic"], {}, r"unknown evaluation methods \['magic'\]"),
        (["base", "base"], {}, "one or more different names"),
        ([], {}, "one or more different names"),
        (["generated"], {"generator": None}, "'generated' needs a generator"),
        (["zero"], {"generator": None}, "'zero' needs a generator"),
        (["shuffled"], {"encoder": None}, "'shuffled' needs a generator"),
        (["nearest"], {}, "'nearest' needs a zoo"),
    ],
)
def test_a_method_that_cannot_run_is_refused_first(names: list[str], changes: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        build_methods(names, make_parts(**changes), TASKS)
    assert caught.value.fix or "different" in match


def test_shuffling_needs_two_tasks() -> None:
    with pytest.raises(ConfigError, match="at least 2 tasks"):
        build_methods(["shuffled"], make_parts(), TASKS[:1])


@pytest.fixture
def zoo_home(home: Home) -> tuple[Home, LoraLayout]:
    """Adapters x and y for this base and encoder; z, v and w are for others and nearer, q cannot be found."""
    layout, wider = (LoraLayout.from_model(tiny_model(), r=r) for r in (2, 3))
    store, axes = AdapterStore(home), torch.eye(3)
    places = (
        ("x", 0, {}),
        ("y", 1, {}),
        ("z", 2, {"base_fingerprint": "other"}),
        ("v", 2, {"encoder_fingerprint": "e2"}),
    )
    about = {"base_name": "tiny", "base_fingerprint": "base", "source": "trained", "encoder_fingerprint": "enc"}
    for i, (name, axis, other) in enumerate(places):
        store.put(random_flat(layout, seed=i), layout, name=name, exemplars=axes[axis : axis + 1], **about | other)
    store.put(random_flat(wider), wider, name="w", exemplars=axes[2:], **about)
    store.put(random_flat(layout, seed=9), layout, name="q", **about)
    return home, layout


def test_nearest_takes_the_best_stored_adapter_that_fits(zoo_home: tuple[Home, LoraLayout]) -> None:
    home, layout = zoo_home
    prompts = torch.nn.functional.normalize(torch.tensor([[0.1, 0.5, 0.9], [0.2, 0.6, 0.9], [0.4, 0.2, 0.9]]), dim=1)
    for folder in (home.root, home.adapters):
        zoo = Zoo(folder, layout, "base", "enc")
        assert [name for name, _ in zoo.rank(prompts)] == ["y", "x"]
        assert torch.equal(zoo.nearest(prompts), random_flat(layout, seed=1))


def test_a_zoo_without_a_fitting_adapter_is_refused(tmp_path: Path, zoo_home: tuple[Home, LoraLayout]) -> None:
    home, layout = zoo_home
    for folder, base, encoder in (
        (tmp_path / "no", "base", "enc"),
        (home.root, "b3", "enc"),
        (home.root, "base", "e3"),
    ):
        with pytest.raises(ConfigError, match=r"no adapter in .* fits this base and encoder"):
            Zoo(folder, layout, base, encoder)
    with pytest.raises(ConfigError, match=r"no adapter in .* fits this base and encoder"):
        Zoo(home.root, LoraLayout.from_model(tiny_model(), r=4), "base", "enc")


def test_nearest_asks_the_zoo_with_the_tasks_own_prompts() -> None:
    class First:
        def nearest(self, pooled: torch.Tensor) -> torch.Tensor:
            return pooled.sum().repeat(4)

    parts = make_parts()
    (method,) = build_methods(["nearest"], parts, TASKS, zoo=First())
    method.make(TASKS[0], 2)
    assert parts.encoder.seen == [conditioning_prompts(TASKS[0], 2)]
