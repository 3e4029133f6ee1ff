"""Schemas for the tests of constrained completion, a hand-written validator, and random walks over what is allowed."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import torch

from dnd_sdk.engine.constraint import Constraint

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
NODE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"anyOf": [{"enum": ["a/b", "ü"]}, {"type": "null"}, {"type": "boolean"}]},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
LINES = {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 2}
CODE = {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"}
SCHEMAS = {"person": PERSON, "node": NODE, "lines": LINES, "code": CODE, "choice": {"enum": ["low", "high", 3]}}

_TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda v: isinstance(v, str),
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
}


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether a value is what a schema says, for the keywords used above."""
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "enum" in schema:
        return value in schema["enum"]
    if "anyOf" in schema:
        return any(fits(value, s, root) for s in schema["anyOf"])
    if not _TYPES[schema["type"]](value):
        return False
    if schema["type"] == "object":
        known = schema["properties"]
        return set(schema["required"]) <= value.keys() <= known.keys() and all(
            fits(v, known[k], root) for k, v in value.items()
        )
    if schema["type"] == "array":
        in_bounds = schema["minItems"] <= len(value) <= schema["maxItems"]
        return in_bounds and all(fits(v, schema["items"], root) for v in value)
    if schema["type"] == "string":
        return len(value) <= schema.get("maxLength", 99) and bool(re.search(schema.get("pattern", ""), value))
    return schema["type"] != "integer" or value <= schema["maximum"]


def allowed(constraint: Constraint, vocab_size: int) -> list[int]:
    """The tokens that a mask leaves."""
    logits = torch.zeros(vocab_size)
    constraint.mask(logits)
    return logits.isfinite().nonzero()[:, 0].tolist()


def walk(constraint: Constraint, vocab_size: int, end: int, seed: int, most: int = 400) -> list[int] | None:
    """Tokens drawn from what is allowed, ended where that is possible one time in two; None: not over after `most`."""
    rng, tokens = random.Random(seed), []
    for _ in range(most):
        options = allowed(constraint, vocab_size)
        token = end if end in options and rng.random() < 0.5 else rng.choice(options)
        constraint.accept(token)
        if token == end:
            return tokens
        tokens.append(token)
    return None
