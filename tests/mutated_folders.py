"""Adapter folders as damage, mistakes and malice leave them: seeded, a kind of mutation after the other."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
Mutation = Callable[[random.Random, Path], None]

ODD: list[Any] = [None, True, -1, 0, 2.5, 1e300, 10**400, math.nan, "", "8", "\ud800", "\x1b[31m\n", "x" * 70_000]
ODD += [[], [[]], [None], {}, {"a": {}}, [1] * 50_000, {"q_proj": 2}, {"(": 1}, {"q_proj": "2"}, ["q_proj"], [10**400]]
KEYS = [
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "base_model_name_or_path",
    "peft_type",
    "bias",
    "use_rslora",
    "use_dora",
    "modules_to_save",
    "init_lora_weights",
    "made_up",
]
PATTERNS = [
    ".*",
    "(",
    "(.*)*" * 9,
    "(" * 9 + "." + "{1,9})" * 9 + "[!?]",
    "[[:alpha:]]",
    "x{e}",
    "a" * 9000,
    "(?R)",
    "\\",
]
NAMES = ["", "x" * 70_000, "../../evil", "\ud800", "\x1b[2J\n", "lora_A.weight", ".lora_A.weight", "a." * 30_000 + "b"]
DTYPES = ["F64", "I32", "U8", "F8_E4M3", "F1", "", "f" * 70_000, "BOOL", "F16"]
SHAPES: list[Any] = [
    [],
    [0],
    [-1, 4],
    [2**63, 2**63],
    [1] * 100_000,
    [9] * 200_000,
    [10**4000] * 50,
    "44",
    None,
    [4.0, 6],
]


class Mutated(NamedTuple):
    """One folder, and how it came about."""

    kind: str
    path: Path


def mutated_folders(sources: list[Path], root: Path, n: int, seed: int = 0) -> Iterator[Mutated]:
    """`n` copies of `sources` in turn, each mutated and removed again once the caller asks for the next."""
    for i in range(n):
        rng = random.Random(f"{seed}-{i}")
        kind, mutate = MUTATIONS[i % len(MUTATIONS)]
        source = sources[(i // len(MUTATIONS)) % len(sources)]
        folder = Path(shutil.copytree(source, root / f"{i}-{kind}"))
        mutate(rng, folder)
        yield Mutated(f"{i} {kind} of {source.name}", folder)
        shutil.rmtree(folder)


def _any_file(rng: random.Random, folder: Path) -> Path:
    return rng.choice(sorted(p for p in folder.iterdir() if p.is_file()))


def _config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the safetensors header; a folder with a pickle gets safetensors first."""
    path = _safetensors(folder)
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + n :])


def _safetensors(folder: Path) -> Path:
    if not (folder / WEIGHTS).exists():
        save_file(torch.load(folder / PICKLED, weights_only=True), folder / WEIGHTS)
        (folder / PICKLED).unlink()
    return folder / WEIGHTS


def _tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors themselves, in the format they have."""
    if (folder / WEIGHTS).exists():
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)
    else:
        tensors = torch.load(folder / PICKLED, weights_only=True)
        change(tensors)
        torch.save(tensors, folder / PICKLED)


def _a_tensor(rng: random.Random, header: dict[str, Any]) -> str:
    return rng.choice(sorted(header.keys() - {"__metadata__"}))


def config_value(rng: random.Random, folder: Path) -> None:
    _config(folder, **{rng.choice(KEYS): rng.choice(ODD)})


def config_values(rng: random.Random, folder: Path) -> None:
    _config(folder, **{key: rng.choice(ODD) for key in rng.sample(KEYS, 4)})


def config_pattern(rng: random.Random, folder: Path) -> None:
    key = rng.choice(["target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"])
    pattern = rng.choice(PATTERNS)
    _config(folder, **{key: {pattern: 2} if key.startswith(("rank", "alpha")) else pattern})
    if key == "layers_pattern":
        _config(folder, layers_to_transform=[1])


def config_narrowed(rng: random.Random, folder: Path) -> None:
    narrowed = [{"layers_to_transform": [1]}, {"exclude_modules": ["q_proj"]}, {"target_modules": ["v_proj"]}]
    _config(folder, **rng.choice([*narrowed, {"target_modules": r".*(q|v)_proj"}, {"target_modules": "all-linear"}]))


def config_without(rng: random.Random, folder: Path) -> None:
    path = folder / CONFIG
    data = json.loads(path.read_text())
    data.pop(rng.choice(sorted(data)))
    path.write_text(json.dumps(data))


def config_text(rng: random.Random, folder: Path) -> None:
    texts = [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"r": ' + b"9" * 5000 + b"}", b" " * (2**20 + 1), b"null"]
    (folder / CONFIG).write_bytes(rng.choice(texts))


def many_patterns(rng: random.Random, folder: Path) -> None:
    n = rng.choice([400, 1000, 20_000])
    _config(folder, **{rng.choice(["rank_pattern", "alpha_pattern"]): {f"m.{i}.*q": 2 for i in range(n)}})


def header_shape(rng: random.Random, folder: Path) -> None:
    _header(folder, lambda h: h[_a_tensor(rng, h)].update(shape=rng.choice(SHAPES)))


def header_dtype(rng: random.Random, folder: Path) -> None:
    _header(folder, lambda h: h[_a_tensor(rng, h)].update(dtype=rng.choice(DTYPES)))


def header_offsets(rng: random.Random, folder: Path) -> None:
    offsets = [[0, 0], [0, 2**62], [-8, 8], [8, 0], [1, 2, 3], None, ["0", "8"], [10**4000, 10**4000]]
    _header(folder, lambda h: h[_a_tensor(rng, h)].update(data_offsets=rng.choice(offsets)))


def header_name(rng: random.Random, folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        name, new = _a_tensor(rng, header), rng.choice(NAMES)
        header[new if rng.random() < 0.5 else f"base_model.model.{new}.lora_A.weight"] = header.pop(name)

    _header(folder, change)


def header_many(rng: random.Random, folder: Path) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    part = rng.choice(["m.{}.q_proj.lora_A.weight", "base_model.model.x.{}.lora_B.weight", "{}"])
    _header(folder, lambda h: h.update({part.format(i): empty for i in range(5000)}))


def header_length(rng: random.Random, folder: Path) -> None:
    path = _safetensors(folder)
    length = rng.choice([0, 1, 2**63, 2**64 - 1, 9 * 2**20, 100])
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])


def prefix_dropped(rng: random.Random, folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors) if rng.random() < 0.5 else list(tensors)[:2]:
            tensors[name.removeprefix("base_model.model.")] = tensors.pop(name)

    _tensors(folder, change)


def tensor_dropped(rng: random.Random, folder: Path) -> None:
    _tensors(folder, lambda t: [t.pop(n) for n in rng.sample(sorted(t), rng.choice([1, 2, len(t)]))] and None)


def tensor_added(rng: random.Random, folder: Path) -> None:
    names = ["lm_head.weight", "base_model.model.vision.fc.lora_A.weight", "base_model.model.model.norm.weight", "x"]
    _tensors(folder, lambda t: t.update({rng.choice(names): torch.ones(2, 2)}))


def tensor_resized(rng: random.Random, folder: Path) -> None:
    shape = rng.choice([(1, 1), (0,), (3, 32), (2, 2, 2), ()])
    _tensors(folder, lambda t: t.update({rng.choice(sorted(t)): torch.ones(shape)}))


def tensor_dtype(rng: random.Random, folder: Path) -> None:
    dtype = rng.choice([torch.float16, torch.bfloat16, torch.float64, torch.int32])
    _tensors(folder, lambda t: t.update({n: v.to(dtype) for n, v in list(t.items())}))


def value_not_finite(rng: random.Random, folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        flat = tensors[rng.choice(sorted(tensors))].view(-1)
        flat[rng.randrange(len(flat))] = rng.choice([math.nan, math.inf, -math.inf])

    _tensors(folder, change)


def values_scaled(rng: random.Random, folder: Path) -> None:
    factor = 10.0 ** rng.choice([-40, -5, 1, 2, 4, 8, 30, 37])
    _tensors(folder, lambda t: t.update({n: v * factor for n, v in list(t.items())}))


def truncated(rng: random.Random, folder: Path) -> None:
    path = _any_file(rng, folder)
    raw = path.read_bytes()
    path.write_bytes(raw[: rng.choice([0, 1, 7, 8, rng.randrange(len(raw) + 1), max(len(raw) - 1, 0)])])


def bit_flipped(rng: random.Random, folder: Path) -> None:
    path = _any_file(rng, folder)
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def bytes_changed(rng: random.Random, folder: Path) -> None:
    path = _any_file(rng, folder)
    raw = bytearray(path.read_bytes())
    at = rng.randrange(len(raw))
    raw[at : at + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(64))
    path.write_bytes(raw)


def file_missing(rng: random.Random, folder: Path) -> None:
    _any_file(rng, folder).unlink()


def file_is_something_else(rng: random.Random, folder: Path) -> None:
    path = _any_file(rng, folder)
    path.unlink()
    how = rng.randrange(6)
    if how == 0:
        path.symlink_to(path)
    elif how == 1:
        path.symlink_to("/etc/hostname")
    elif how == 2:
        path.symlink_to("nowhere")
    elif how == 3:
        os.mkfifo(path)
    elif how == 4:
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")


def files_swapped(rng: random.Random, folder: Path) -> None:
    one, two = rng.sample(sorted(p for p in folder.iterdir() if p.is_file()), 2)
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)


def manifest_value(rng: random.Random, folder: Path) -> None:
    """Of an exported one: a field of `dnd.json`; of others: a `dnd.json` of its own."""
    path = folder / "dnd.json"
    data = json.loads(path.read_text()) if path.exists() else {"format_version": 1, "made_up": 1}
    data[rng.choice(sorted(data))] = rng.choice(ODD)
    path.write_text(json.dumps(data))


MUTATIONS: list[tuple[str, Mutation]] = [
    (mutation.__name__, mutation)
    for mutation in (
        config_value,
        config_values,
        config_pattern,
        config_narrowed,
        config_without,
        config_text,
        many_patterns,
        header_shape,
        header_dtype,
        header_offsets,
        header_name,
        header_many,
        header_length,
        prefix_dropped,
        tensor_dropped,
        tensor_added,
        tensor_resized,
        tensor_dtype,
        value_not_finite,
        values_scaled,
        truncated,
        bit_flipped,
        bytes_changed,
        file_missing,
        file_is_something_else,
        files_swapped,
        manifest_value,
    )
]
