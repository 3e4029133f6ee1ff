"""The adapter's README.md: what it is, made from its fields alone."""

from __future__ import annotations

import json

from dnd_sdk.adapters.adapter import Adapter
from dnd_sdk.lora import LoraLayout
from dnd_sdk.prompts import Role

CARD = "README.md"

_ORIGIN = {
    "generated": "Its weights were **generated, not trained**: one forward pass over unlabeled prompts made them.",
    "trained": "Its weights were trained by gradient descent.",
    "imported": "Its weights were imported from another PEFT folder.",
    "merged": "Its weights are a weighted mean of other adapters' weight changes.",
}
_LIMITS = {
    "generated": (
        "No labelled example was seen while it was made. It may know the task's form better than its content: compare "
        "it with the base model on questions of your own before relying on it."
    ),
    "trained": "It is good for tasks like the one it was trained on; compare it with the base model elsewhere.",
    "imported": "Nothing is known here about how it was made; compare it with the base model before relying on it.",
    "merged": "It answers like a mixture of its parents; compare it with them and the base model before relying on it.",
}


def card_text(adapter: Adapter, layout: LoraLayout, base_name: str) -> str:
    """The whole card."""
    return "\n".join(
        [
            *_front_matter(base_name),
            f"# {adapter.name}",
            "",
            f"A LoRA adapter for `{base_name}`. {_ORIGIN[adapter.source]}",
            "",
            *(f"- {key}: {value}" for key, value in _facts(adapter, layout) if value is not None),
            "",
            "## Use",
            "",
            f"`dnd run -a {adapter.name} TEXT`, or as a PEFT folder: `peft.PeftModel.from_pretrained(base, folder)`.",
            "",
            "## Limits",
            "",
            f"It fits this base model only. {_LIMITS[adapter.source]}",
            "",
        ]
    )


def _front_matter(base_name: str) -> list[str]:
    # a JSON string is a YAML string, whatever characters the name holds
    return ["---", f"base_model: {json.dumps(base_name)}", "library_name: peft", "tags: [lora, dnd]", "---", ""]


def _facts(adapter: Adapter, layout: LoraLayout) -> list[tuple[str, str | None]]:
    prompts = None if adapter.n_prompts is None else f"{adapter.n_prompts}"
    if prompts and adapter.prompt_hash:
        prompts += f" (set hash `{adapter.prompt_hash}`)"
    scores = ", ".join(f"{k} {v:.4g}" for k, v in sorted(adapter.scores.items()))
    return [
        ("base fingerprint", f"`{adapter.base_fingerprint}`"),
        ("rank", f"{layout.r}, lora_alpha {layout.lora_alpha:g}, {len(layout.modules)} modules"),
        ("parameters", f"{layout.n_parameters:,}"),
        ("prompts", prompts),
        ("generator", adapter.generator and f"`{adapter.generator}`"),
        ("encoder", adapter.encoder and f"`{adapter.encoder}`"),
        ("scores", scores or None),
        ("written by", adapter.origin),
        ("role", adapter.role and json.dumps(Role.parse(adapter.role).brief, ensure_ascii=False)),
        ("merged from", ", ".join(f"`{i[:16]}` x {w:.3g}" for i, w in adapter.parents.items()) or None),
        ("created", adapter.created),
        ("id", f"`{adapter.id}`"),
    ]
