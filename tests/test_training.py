"""Training on a tiny base: it learns, it resumes to the same curve after kill -9, it leaves a generator that loads."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import SAME_MATHS, random_flat, tiny_model
from training_parts import config_file, make_world, silent

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError, GeneratorError, InputError, LayoutMismatchError
from dnd_sdk.evaluation import Zoo
from dnd_sdk.generator.card import record_evaluation
from dnd_sdk.generator.generator import Generator, GeneratorConfig
from dnd_sdk.lora.layout import LoraLayout
from dnd_sdk.lora.linear import attach_lora, tables_from_flat, use_lora
from dnd_sdk.models.encoder import Encoder
from dnd_sdk.training import run_generator, run_zoo
from dnd_sdk.training.batches import TokenRow, answer_loss, micro_batches
from dnd_sdk.training.curriculum import sample_tasks
from dnd_sdk.training.int8_base import quantize_frozen_linears
from dnd_sdk.training.objectives import masked_mse
from dnd_sdk.training.parts import prepare
from dnd_sdk.training.recipe import new_generator
from dnd_sdk.training.run_dir import RunDir
from dnd_sdk.training.settings import read_settings
from dnd_sdk.training.zoo import initial_adapter, read_zoo


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def trained(world: Path) -> Path:
    home = Home(world / "home")
    run_zoo(world / "tasks", world / "train.toml", world / "zoo", home=home, progress=silent)
    out = world / "run"
    run_generator(world / "tasks", world / "train.toml", out, zoo=world / "zoo", home=home, progress=silent)
    return world


def test_zoo_learns_and_keeps_one_adapter_per_train_task(trained: Path) -> None:
    losses = [x["loss"] for x in RunDir.read_losses(trained / "zoo" / "shared")]
    assert losses[-1] < losses[0]
    shared, tasks = read_zoo(trained / "zoo")
    index = json.loads((trained / "tasks" / "index.json").read_text())
    assert sorted(tasks) == sorted(t["name"] for t in index if t["role"] == "train")
    layout = LoraLayout.from_model(tiny_model(), r=4)
    for snapshots in tasks.values():
        assert snapshots.shape == (2, layout.n_parameters)
        for segment, view in layout.views(snapshots[-1] - shared):
            assert (view.abs().max() > 0) == (segment.part == "lora_B"), segment


def test_generator_folder_loads_and_uses_its_condition(trained: Path) -> None:
    layout = LoraLayout.from_model(tiny_model(), r=4)
    generator = Generator.from_pretrained(trained / "run" / "generator", layout)
    one, other = torch.randn(5, 8, 32), torch.randn(5, 8, 32)
    assert not torch.equal(generator.generate(one), generator.generate(other))
    files = {p.name for p in (trained / "run" / "generator").iterdir()}
    assert {"config.json", "model.safetensors", "router.json", "support.safetensors", "README.md"} <= files
    assert "Training tasks and their licences" in (trained / "run" / "generator" / "README.md").read_text()


def test_card_shows_the_figures_of_an_evaluation(trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained / "run" / "generator", tmp_path / "g"))
    scores = {"exact_match": 0.25, "option_accuracy": None, "valid_format": 1.0}
    report = {"settings": {"n_tasks": 3, "limit": 5}, "methods": {"generated": {"mean": scores}}}
    assert "25.0" not in (folder / "README.md").read_text()
    record_evaluation(folder, report)
    assert "| generated | 25.0 | - | 100.0 |" in (folder / "README.md").read_text()
    with pytest.raises(GeneratorError, match=r"training\.json"):
        record_evaluation(tmp_path, report)


def test_zoo_is_stored_so_that_prompts_find_it(trained: Path) -> None:
    _, tasks = read_zoo(trained / "zoo")
    store = AdapterStore(Home(trained / "run"))
    assert sorted(a.name for a in store.ls()) == sorted(tasks)
    layout = LoraLayout.from_model(tiny_model(), r=4)
    for adapter in store.ls():
        torch.testing.assert_close(store.load(adapter, layout), tasks[adapter.name].mean(0))
        assert store.exemplars(adapter) is not None
    assert store.verify() == []


def test_the_multi_task_adapter_is_kept_beside_the_zoo(trained: Path) -> None:
    fitting = {a.base_fingerprint: a.encoder_fingerprint for a in AdapterStore(Home(trained / "run")).ls()}
    [(base, encoder)] = fitting.items()
    zoo = Zoo(trained / "run", LoraLayout.from_model(tiny_model(), r=4), base, encoder)
    torch.testing.assert_close(zoo.multitask(), read_zoo(trained / "zoo")[0], rtol=0, atol=0)
    assert zoo.training_settings()["per_task"]["steps"] == 3
    assert zoo.mean().shape == zoo.multitask().shape


def test_training_goes_on_from_a_finished_generator(trained: Path, tmp_path: Path) -> None:
    for part in ("base", "encoder"):
        (tmp_path / part).symlink_to(trained / part)
    start = Generator.from_pretrained(trained / "run" / "generator")
    line = f'start = "{trained / "run" / "generator"}"'
    more = read_settings(config_file(tmp_path, shared_steps="0", start=line))
    home = Home(trained / "home")
    run_zoo(trained / "tasks", tmp_path / "train.toml", tmp_path / "zoo", home=home, progress=silent)
    assert torch.equal(read_zoo(tmp_path / "zoo")[0], start.mean())
    manifest = json.loads((tmp_path / "zoo" / "shared" / "manifest.json").read_text())
    assert manifest["start"] == start.id
    parts = prepare(trained / "tasks", more, home, silent)
    encoder = Encoder.load(more.encoder, home)
    going_on, fresh = new_generator(more, parts, encoder), new_generator(more, replace(parts, start=None), encoder)
    assert going_on.id == start.id != fresh.id
    wider = read_settings(config_file(tmp_path, start=line, width="16"))
    with pytest.raises(ConfigError, match=r"width \(8, here 16\)"):
        new_generator(wider, parts, encoder)
    anew = wider.model_copy(update={"generator": wider.generator.model_copy(update={"fresh": True})})
    made = new_generator(anew, parts, encoder)  # its shared adapter comes from the zoo, which went on from `start`
    assert made.config.width == 16 and not made.gain.any()


def test_the_decoder_is_heard_from_the_first_step_where_the_recipe_says_so(trained: Path, tmp_path: Path) -> None:
    gains = []
    for line in ("", "first_gain = 0.5\n"):
        out = tmp_path / (line[:5] or "plain")
        shutil.copytree(trained / "tasks", out / "tasks")
        for part in ("base", "encoder"):
            (out / part).symlink_to(trained / part)
        text = config_file(out, stages="1").read_text()
        first, _, end = text.partition("[[stages]]")
        end = end[end.index("[[stages]]") :].replace("train_shared = true\n", f"train_shared = true\n{line}")
        (out / "train.toml").write_text(first + end)
        home, zoo = Home(trained / "home"), trained / "zoo"
        run_generator(out / "tasks", out / "train.toml", out / "run", zoo=zoo, home=home, progress=silent)
        gains.append(RunDir.read_losses(out / "run" / "stage-0")[0]["gain"])
    assert gains[0] < 0.01 and gains[1] == pytest.approx(0.5, abs=0.01)


def test_other_settings_refuse_to_continue_a_run(trained: Path, tmp_path: Path) -> None:
    RunDir(tmp_path / "run", {"seed": 0, "stage": {"lr": 1}})
    with pytest.raises(ConfigError, match="other stage"):
        RunDir(tmp_path / "run", {"seed": 0, "stage": {"lr": 2}})


def test_generator_needs_a_finished_zoo(world: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished zoo"):
        run_generator(
            world / "tasks", world / "train.toml", tmp_path / "o", zoo=tmp_path, home=Home(tmp_path), progress=print
        )


def test_settings_name_the_bad_key(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("[shared]\nstepz = 3\n")
    with pytest.raises(ConfigError, match=r"shared\.stepz"):
        read_settings(path)
    path.write_text("[shared\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_settings(path)


def test_micro_batches_give_the_loss_and_gradient_of_single_rows() -> None:
    model = tiny_model()
    layout = LoraLayout.from_model(model, r=2)
    attach_lora(model, layout)
    rows = [(TokenRow(tuple(range(4, 4 + n)), n - k), i % 2) for i, (n, k) in enumerate([(9, 2), (30, 1), (12, 5)])]
    flat = torch.stack([random_flat(layout, seed=s) for s in (1, 2)])

    batched = flat.clone().requires_grad_()
    total = 0.0
    for batch in micro_batches(rows, max_padded=64, pad=0):
        with use_lora(tables_from_flat(layout, batched), batch.owner):
            loss = answer_loss(model, batch)
        loss.backward()
        total += loss.item()

    single = flat.clone().requires_grad_()
    losses = []
    for row, owner in rows:
        with use_lora(tables_from_flat(layout, single), owner):
            logits = model(torch.tensor([row.ids])).logits[0]
        answer = torch.tensor(row.ids[row.n_prompt :])
        losses.append(torch.nn.functional.cross_entropy(logits[row.n_prompt - 1 : -1], answer))
    torch.stack(losses).mean().backward()
    assert total == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    torch.testing.assert_close(batched.grad, single.grad, rtol=1e-4, atol=1e-6)


def test_every_task_comes_once_per_pass() -> None:
    names = [f"t{i}" for i in range(7)]
    seen = [n for step in range(3) for n in sample_tasks(names, 2, step, seed=1)]
    assert len(seen) == len(set(seen)) == 6


def test_initial_adapter_is_the_base_with_orthonormal_a() -> None:
    layout = LoraLayout.from_model(tiny_model(), r=4)
    for segment, view in layout.views(initial_adapter(layout, seed=3)):
        if segment.part == "lora_A":
            torch.testing.assert_close(view @ view.T, torch.eye(4), **SAME_MATHS)
        else:
            assert not view.any()


def test_int8_base_stays_near_the_exact_one() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48)
    holder = torch.nn.ModuleDict({"q_proj": linear})
    layout = LoraLayout.from_model(holder, target_modules=("q_proj",))
    x = torch.randn(40, 64, requires_grad=True)
    exact = linear(x)
    (grad,) = torch.autograd.grad(exact.square().sum(), x)
    quantize_frozen_linears(holder, layout)
    rough = linear(x)
    (rough_grad,) = torch.autograd.grad(rough.square().sum(), x)
    assert not torch.equal(exact, rough)
    assert (exact - rough).norm() / exact.norm() < 0.02
    assert (grad - rough_grad).norm() / grad.norm() < 0.03


def test_a_base_in_bfloat16_gives_nearly_the_same_loss_and_gradient(trained: Path) -> None:
    recipe, home = (trained / "train.toml").read_text(), Home(trained / "home")
    found = []
    for precision in ("exact", "bfloat16"):
        path = trained / f"{precision}.toml"
        path.write_text(recipe.replace("[run]", f'[run]\nbase_precision = "{precision}"'))
        parts = prepare(trained / "tasks", read_settings(path), home, silent)
        base, curriculum = parts.base, parts.curriculum
        flat = random_flat(base.layout, std=0.05).requires_grad_()
        rows = [(row, 0) for name in curriculum.tasks for row in curriculum.rows(name, 4, 0)]
        with base.half():
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert (product.dtype == torch.bfloat16) == (precision == "bfloat16")
        found.append((base.model.dtype, base.backward(flat[None], rows), flat.grad))
    (_, loss, grad), (half, near, near_grad) = found
    assert half == torch.bfloat16 and near != loss and near == pytest.approx(loss, rel=0.01)
    assert near_grad.dtype == torch.float32 and (near_grad - grad).norm() / grad.norm() < 0.05


def test_reconstruction_can_overfit_two_adapters() -> None:
    layout = LoraLayout.from_model(tiny_model(), r=4)
    torch.manual_seed(0)
    generator = Generator(GeneratorConfig(encoder_width=32, n_prompts=4, state_tokens=8, width=8), layout)
    tokenizer = generator.weight_tokenizer
    x = torch.randn(2, 4, 8, 32)
    target = tokenizer.tokenise(torch.stack([random_flat(layout, seed=s) for s in (1, 2)]))
    weights = torch.ones(tokenizer.T, 1, 1)
    optimizer = torch.optim.AdamW(generator.decoder.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = masked_mse(generator.decoder(x), target, weights)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def _generator(layout: LoraLayout, **sizes: int) -> Generator:
    torch.manual_seed(0)
    config = GeneratorConfig(encoder_width=32, **({"n_prompts": 4, "state_tokens": 8, "width": 8} | sizes))
    generator = Generator(config, layout).eval()
    generator.shared.data.copy_(random_flat(layout))
    generator.gain.data.fill_(0.7)
    return generator


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9, 40])
def test_any_number_of_prompts_in_any_order(n: int) -> None:
    layout = LoraLayout.from_model(tiny_model(), r=4)
    generator = _generator(layout)
    states = torch.randn(n, 8, 32)
    flat = generator.generate(states)
    assert flat.shape == (layout.n_parameters,) and flat.isfinite().all()
    torch.testing.assert_close(generator.generate(states[torch.randperm(n)]), flat, **SAME_MATHS)


def test_zeroed_condition_is_the_shared_adapter() -> None:
    generator = _generator(LoraLayout.from_model(tiny_model(), r=4))
    torch.testing.assert_close(generator.generate(torch.zeros(3, 8, 32)), generator.mean(), **SAME_MATHS)
    torch.testing.assert_close(generator(torch.zeros(2, 4, 8, 32))[1], generator.mean(), **SAME_MATHS)
    assert not torch.allclose(generator.generate(torch.randn(3, 8, 32)), generator.mean(), atol=1e-3)


def test_training_and_serving_forward_agree() -> None:
    generator = _generator(LoraLayout.from_model(tiny_model(), r=4))
    states = torch.randn(4, 8, 32)
    x = generator.condition(states)
    torch.testing.assert_close(generator(x)[0], generator.generate(states), **SAME_MATHS)


def test_save_and_load_are_exact_and_checked(tmp_path: Path) -> None:
    layout = LoraLayout.from_model(tiny_model(), r=4)
    generator = _generator(layout)
    generator.save_pretrained(tmp_path)
    again = Generator.from_pretrained(tmp_path, layout)
    states = torch.randn(3, 8, 32)
    assert torch.equal(again.generate(states), generator.generate(states)) and again.id == generator.id
    with pytest.raises(LayoutMismatchError, match="does not fit this base"):
        Generator.from_pretrained(tmp_path, LoraLayout.from_model(tiny_model(), r=8))
    with pytest.raises(GeneratorError, match="takes"):
        again.generate(torch.randn(3, 9, 32))
    with pytest.raises(GeneratorError, match="NaN"):
        again.generate(torch.full((3, 8, 32), torch.nan))


@pytest.mark.parametrize("damage", ["no config", "json", "version", "truncated", "shape", "nan", "extra", "no weights"])
def test_damaged_generator_folder(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    _generator(LoraLayout.from_model(tiny_model(), r=4)).save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    tensors = load_file(weights)
    if damage == "no config":
        config.unlink()
    elif damage == "json":
        config.write_text("{")
    elif damage == "version":
        config.write_text(json.dumps({**json.loads(config.read_text()), "format_version": 99}))
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no weights":
        weights.unlink()
    else:
        changed = {"shape": tensors["gain"][:-1], "nan": tensors["gain"] * torch.nan, "extra": tensors["gain"]}[damage]
        save_file({**tensors, "gain" if damage != "extra" else "other": changed.clone()}, weights)
    with pytest.raises(GeneratorError):
        Generator.from_pretrained(tmp_path)
