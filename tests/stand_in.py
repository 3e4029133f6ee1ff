"""A tiny installation under the default names, and a working folder: there, commands run as a text writes them."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_model, tiny_tokenizer
from tiny_world import ENCODER_WIDTH, prompts_of, save_encoder, save_generator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dnd_sdk.config import Home
from dnd_sdk.generator import finding
from dnd_sdk.models.catalogue import DEFAULT_BASE, DEFAULT_ENCODER, EMBEDDED, SMALL_BASE
from dnd_sdk.models.embedded import SOURCE_FILE
from dnd_sdk.models.encoder import Encoder
from dnd_sdk.models.loading import load_base
from dnd_sdk.models.wheels import sha256_file
from dnd_sdk.routing import RouterData, Support, Thresholds


def shortened(recipe: str) -> str:
    """The recipe with two steps in place of its hundreds, and one task held out in place of many."""
    return re.sub(r"(?m)^held_out = \d+", "held_out = 1", re.sub(r"(?m)^steps = \d+", "steps = 2", recipe))


def long_model() -> PreTrainedModel:
    """To the tiny tokenizer an ordinary prompt is long: one token a byte."""
    model = tiny_model(layers=1)
    model.config.max_position_embeddings = 16_384
    return model


def install(
    root: Path,
    patch: pytest.MonkeyPatch,
    base: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
    *,
    encoder_width: int = ENCODER_WIDTH,
) -> Home:
    """Tiny models under the default names, which every part of the SDK takes for the default ones.

    `base` is a model and its tokenizer, None a random one.
    """
    home = Home(root / "home")
    save_encoder(home.models / DEFAULT_ENCODER, width=encoder_width)
    for part, name in itertools.product(base or (long_model(), tiny_tokenizer()), (DEFAULT_BASE, SMALL_BASE)):
        part.save_pretrained(home.models / name)
    for name in (DEFAULT_BASE, SMALL_BASE, DEFAULT_ENCODER):
        known, folder = EMBEDDED[name], home.models / name
        files = sorted(folder.iterdir())
        source: dict[str, Any] = {"format_version": 2, "wheels": [{"sha256": w.sha256} for w in known.wheels]}
        source |= {
            "files": {p.name: p.stat().st_size for p in files},
            "sha256": {p.name: sha256_file(p) for p in files},
        }
        (folder / SOURCE_FILE).write_text(json.dumps(source), "utf-8")
        pins = {file: sha256_file(folder / file) for file in known.pins if (folder / file).is_file()}
        patch.setitem(EMBEDDED, name, replace(known, pins=pins))
    encoder = Encoder.load(DEFAULT_ENCODER, home)
    made = save_generator(root / "generators" / "tiny", load_base(DEFAULT_BASE, home), encoder, r=8)
    # tell the example jobs apart, which to this encoder are much alike
    thresholds = Thresholds(reuse=0.995, reuse_single=0.996, support=-1.0)
    RouterData(thresholds, Support(encoder.encode(["A job."], with_states=False).pooled)).save(made)
    patch.setattr(finding, "SHIPPED", made.parent)
    return home


def furnish(place: Path, examples: Path, tasks: Path, recipe: str) -> Path:
    """A working folder with the examples, and everything that a command takes and none makes."""
    (place / "examples").mkdir(parents=True)
    for path in examples.iterdir():
        if path.suffix == ".toml":
            (place / "examples" / path.name).write_text(shortened(path.read_text("utf-8")), "utf-8")
        else:
            (place / "examples" / path.name).symlink_to(path)
    (place / "PROMPTS").symlink_to(examples / "meeting_deadlines" / "prompts.jsonl")
    (place / "recipe.toml").write_text(shortened(recipe), "utf-8")
    (place / "role.md").write_text("# Role: Clerk\n\n## Rules\n- Be brief.\n", "utf-8")
    (place / "TASKS").symlink_to(tasks)
    (place / "TASKS_FOLDER").mkdir()
    for i in range(20):
        rows = [{"prompt": f"{i}: {p}", "response": "x", "split": "train"} for p in prompts_of("upper", 6)]
        rows.append({"prompt": f"{i}", "response": "x", "split": "test"})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (place / "TASKS_FOLDER" / f"task_{i}.jsonl").write_text(text, "utf-8")
    return place
