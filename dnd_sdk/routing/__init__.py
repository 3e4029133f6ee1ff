"""Which adapter fits a set of prompts: an index of prompt embeddings, measured thresholds, a decision as a value."""

from __future__ import annotations

from dnd_sdk.routing.calibration import Calibration, Thresholds, fit_thresholds
from dnd_sdk.routing.index import AdapterIndex, Hit
from dnd_sdk.routing.probability import Probabilities, ScoreMap
from dnd_sdk.routing.router import RouteDecision, Router
from dnd_sdk.routing.similarity import MAX_EXEMPLARS, choose_exemplars
from dnd_sdk.routing.support import Support, noise_prompts

__all__ = [
    "MAX_EXEMPLARS",
    "AdapterIndex",
    "Calibration",
    "Hit",
    "Probabilities",
    "RouteDecision",
    "Router",
    "ScoreMap",
    "Support",
    "Thresholds",
    "choose_exemplars",
    "fit_thresholds",
    "noise_prompts",
]
