from __future__ import annotations

from pathlib import Path

import pytest
import torch
from eval_fakes import FakeTrainer, FakeZoo, make_parts, make_task
from helpers import random_flat, tiny_model
from safetensors.torch import save_file

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.config import Home
from dnd_sdk.errors import AdapterCorruptError, ConfigError, InputError, LayoutMismatchError
from dnd_sdk.evaluation import Zoo
from dnd_sdk.evaluation.drawing import conditioning_prompts, donors, example_rows, instruction
from dnd_sdk.evaluation.methods import KINDS, METHODS_HELP, build_methods, default_methods, needs_training, parse
from dnd_sdk.evaluation.treatment import Treatment
from dnd_sdk.lora.layout import LoraLayout
from dnd_sdk.tasks.reading import Row

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
    assert made["base"].make(task, 0) == Treatment(None, None, ())
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


def test_calibration_sees_the_prompts_that_its_name_says() -> None:
    parts, task, seed = make_parts(), TASKS[1], 3
    names = ["uncalibrated", "uncalibrated-shuffled", "zero", "generated", "shuffled", "calibrated-zero"]
    flats = {m.name: m.make(task, seed).flat for m in build_methods(names, parts, TASKS)}
    own, other = conditioning_prompts(task, seed), conditioning_prompts(donors(TASKS, seed)[task.name], seed)
    assert parts.label_calibration.seen == [(own, own), (other, other), (own, own)]
    for plain, calibrated in (names[0], names[3]), (names[1], names[4]), (names[2], names[5]):
        assert torch.equal(flats[calibrated], flats[plain] + 0.5)


@pytest.mark.parametrize(
    ("names", "changes", "match"),
    [
        (["base", "magic"], {}, r"unknown evaluation methods \['magic'\]"),
        (["base", "base"], {}, "one or more different names"),
        ([], {}, "one or more different names"),
        (["generated"], {"generator": None}, "'generated' needs a generator"),
        (["zero"], {"generator": None}, "'zero' needs a generator"),
        (["shuffled"], {"encoder": None}, "'shuffled' needs a text encoder"),
        (["calibrated-zero"], {"generator": None}, "'calibrated-zero' needs a generator"),
        (["uncalibrated"], {"generator": None}, "'uncalibrated' needs a generator"),
        (["generated"], {"label_calibration": None}, "'generated' needs a base to calibrate on"),
        (["nearest"], {}, "'nearest' needs a zoo"),
        (["mean"], {}, "'mean' needs a zoo"),
        (["multitask"], {}, "'multitask' needs a zoo"),
        (["merge-2"], {}, "'merge-2' needs a zoo"),
        (["oracle"], {}, "'oracle' needs a trainer"),
        (["scratch-3"], {}, "'scratch-3' needs a trainer"),
        (["icl-0"], {}, r"unknown evaluation methods \['icl-0'\]"),
        (["merge"], {}, "unknown evaluation methods"),
        (["polish-1.5"], {}, "unknown evaluation methods"),
        (["base-2"], {}, "unknown evaluation methods"),
    ],
)
def test_a_method_that_cannot_run_is_refused_first(names: list[str], changes: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        build_methods(names, make_parts(**changes), TASKS)
    assert caught.value.fix or "different" in match


def test_help_spells_every_kind_once_and_every_spelling_is_a_method() -> None:
    listed, default = (t.replace("; with --zoo also ", ", ") for t in METHODS_HELP.split(". Without it "))
    spellings = listed.replace("; trained here: ", ", ").removeprefix("Comma separated: ").split(", ")
    parsed = [parse(s.replace("-STEPS", "-7").replace("-K", "-7")) for s in spellings]
    assert None not in parsed and len(set(parsed)) == len(parsed) and {kind for kind, _ in parsed} == set(KINDS)
    assert "icl-K" in spellings and "icl" not in spellings and {"oracle", "oracle-STEPS"} <= set(spellings)
    assert tuple(default.removesuffix(".").split(", ")) == default_methods(FakeZoo())


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


def test_nearest_and_merge_ask_the_zoo_with_the_tasks_own_prompts() -> None:
    parts = make_parts()
    for method in build_methods(["nearest", "merge-2"], parts, TASKS, zoo=FakeZoo()):
        method.make(TASKS[0], 2)
    assert parts.encoder.seen == [conditioning_prompts(TASKS[0], 2)] * 2


def test_what_the_zoo_cannot_give_is_refused_first() -> None:
    for names, zoo, match in (
        (["mean"], FakeZoo(mixable=False), "different A"),
        (["merge-2"], FakeZoo(mixable=False), "different A"),
        (["multitask"], FakeZoo(shared=None), "'multitask' needs the zoo's multi-task LoRA"),
        (["oracle-9"], FakeZoo(shared=None), "'oracle-9' needs the zoo's multi-task LoRA"),
    ):
        with pytest.raises(ConfigError, match=match):
            build_methods(names, make_parts(), TASKS, zoo=zoo, trainer=FakeTrainer())
    with pytest.raises(ConfigError, match="'polish-2' needs a generator"):
        build_methods(["polish-2"], make_parts(generator=None), TASKS, trainer=FakeTrainer())


def test_named_kinds_and_numbers_reach_their_parts() -> None:
    parts, zoo, trainer, task = make_parts(), FakeZoo(), FakeTrainer(), TASKS[0]
    names = ["mean", "multitask", "oracle", "oracle-9", "polish-2", "scratch-2", "generated", "icl-3"]
    made = {m.name: m for m in build_methods(names, parts, TASKS, zoo=zoo, trainer=trainer)}
    said = {name: m.make(task, 1) for name, m in made.items()}
    assert torch.equal(said["mean"].flat, zoo.mean()) and torch.equal(said["multitask"].flat, zoo.shared)
    assert [(name, seed, steps) for name, seed, _, steps in trainer.asked] == [
        ("alpha", 1, None),
        ("alpha", 1, 9),
        ("alpha", 1, 2),
        ("alpha", 1, 2),
    ]
    starts = [start for _, _, start, _ in trainer.asked]
    assert starts[0] is starts[1] is zoo.shared and starts[3] is None
    assert torch.equal(starts[2], said["generated"].flat)
    assert said["icl-3"] == Treatment(shots=example_rows(task, 1, 3))
    assert [n for n, m in made.items() if not m.seeded] == ["mean", "multitask"]


def test_examples_are_unseen_train_rows_and_more_of_them_keep_the_first() -> None:
    task = make_task("t", n=8, test=(Row("t train 3", "yes", "test"),))
    three, all_of_them = example_rows(task, 0, 3), example_rows(task, 0, 99)
    assert all_of_them[:3] == three and len(all_of_them) == 7 and set(all_of_them) < set(task.train)
    assert "t train 3" not in {r.prompt for r in all_of_them}
    assert three == example_rows(task, 0, 3) != example_rows(task, 1, 3)


def test_defaults_follow_the_zoo() -> None:
    alone = default_methods(None)
    assert "nearest" not in alone and not needs_training(alone)
    assert set(default_methods(FakeZoo())) - set(alone) == {"nearest", "mean", "merge-3", "multitask"}
    assert "multitask" not in default_methods(FakeZoo(shared=None))
    assert [needs_training([n]) for n in ("oracle", "polish-3", "icl-3", "nope")] == [True, True, False, False]


@pytest.fixture
def mixable(home: Home) -> tuple[Zoo, LoraLayout, dict[str, torch.Tensor]]:
    """A zoo of three adapters with one A, at the three axes."""
    layout, store = LoraLayout.from_model(tiny_model(), r=2), AdapterStore(home)
    shared, flats = random_flat(layout, seed=0), {}
    for i, name in enumerate("xyz"):
        flats[name] = random_flat(layout, seed=i + 1)
        for (segment, own), (_, A) in zip(layout.views(flats[name]), layout.views(shared), strict=True):
            if segment.part == "lora_A":
                own.copy_(A)
        store.put(
            flats[name],
            layout,
            name=name,
            base_name="tiny",
            base_fingerprint="base",
            source="trained",
            exemplars=torch.eye(3)[i : i + 1],
            encoder_fingerprint="enc",
        )
    return Zoo(home.root, layout, "base", "enc"), layout, flats


def test_a_merge_averages_the_weight_updates(mixable: tuple[Zoo, LoraLayout, dict[str, torch.Tensor]]) -> None:
    zoo, layout, flats = mixable
    prompts = torch.nn.functional.normalize(torch.tensor([[0.1, 0.8, 0.5], [0.2, 0.7, 0.5]]), dim=1)
    ranked = zoo.rank(prompts)
    assert [n for n, _ in ranked] == ["y", "z", "x"]
    (_, first), (_, second) = ranked[:2]
    expected = {"y": first / (first + second), "z": second / (first + second)}
    thirds = dict.fromkeys("xyz", 1 / 3)
    for merged, weights in ((zoo.merge(prompts, 2), expected), (zoo.mean(), thirds)):
        views = [list(layout.views(v)) for v in (merged, *(flats[n] for n in weights))]
        for i in range(0, len(views[0]), 2):
            (_, a), (_, b) = views[0][i], views[0][i + 1]
            whole = sum(w * (v[i + 1][1] @ v[i][1]) for v, w in zip(views[1:], weights.values(), strict=True))
            torch.testing.assert_close(b @ a, whole)
    torch.testing.assert_close(zoo.merge(prompts, 1), flats["y"])
    torch.testing.assert_close(zoo.merge(prompts, 9), zoo.merge(prompts, 3))
    far = torch.tensor([[-1.0, 0.0, 0.0]])  # no similarity above zero: the weights are equal
    torch.testing.assert_close(zoo.merge(far, 3), zoo.mean())


def test_adapters_of_different_a_cannot_be_averaged(zoo_home: tuple[Home, LoraLayout]) -> None:
    zoo = Zoo(zoo_home[0].root, zoo_home[1], "base", "enc")
    for call in (zoo.mean, lambda: zoo.merge(torch.eye(3)[:2], 2)):
        with pytest.raises(ConfigError, match=r"'x' and 'y' have different A"):
            call()


def test_the_multi_task_adapter_lies_beside_the_others(zoo_home: tuple[Home, LoraLayout]) -> None:
    home, layout = zoo_home
    zoo, path = Zoo(home.adapters, layout, "base", "enc"), home.root / "shared.safetensors"
    assert zoo.multitask() is None and zoo.training_settings() == {}
    flat = random_flat(layout, seed=5)
    save_file({"shared": flat}, path)
    assert torch.equal(zoo.multitask(), flat)
    for tensors, error in (
        ({"shared": flat[1:]}, LayoutMismatchError),
        ({"shared": flat / 0}, AdapterCorruptError),
        ({"other": flat}, AdapterCorruptError),
        ({"shared": flat.long()}, AdapterCorruptError),
        ({"shared": flat.repeat(2000)}, AdapterCorruptError),
    ):
        save_file(tensors, path)
        with pytest.raises(error):
            zoo.multitask()
    (home.root / "generator").mkdir()
    (home.root / "generator" / "training.json").write_text('{"settings": {"per_task": {"steps": 3}}}')
    assert zoo.training_settings() == {"per_task": {"steps": 3}}
