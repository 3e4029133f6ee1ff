"""Judging methods on tasks: what a generated adapter is worth, beside the baselines that decide whether it counts."""

from __future__ import annotations

from dnd_sdk.evaluation.answered import report_answered
from dnd_sdk.evaluation.methods import MAX_PROMPTS, METHODS, default_methods, needs_training
from dnd_sdk.evaluation.parts import Parts
from dnd_sdk.evaluation.report import render
from dnd_sdk.evaluation.runner import EvalSettings, Progress, evaluate
from dnd_sdk.evaluation.trained import TaskTrainer
from dnd_sdk.evaluation.zoo import Zoo

__all__ = [
    "MAX_PROMPTS",
    "METHODS",
    "EvalSettings",
    "Parts",
    "Progress",
    "TaskTrainer",
    "Zoo",
    "default_methods",
    "evaluate",
    "needs_training",
    "render",
    "report_answered",
]
