"""What a framework's model of a session is set up with, the same in each; and how such settings are checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

from dnd_sdk.adapters import Adapter
from dnd_sdk.config import SAMPLING, SamplingOptions
from dnd_sdk.session.choosing import AUTO
from dnd_sdk.session.options import renamed


class ModelFields(BaseModel):
    """Fields beside the base's name and the length of an answer, which frameworks call differently."""

    generator: str | None = Field(None, description="A generator's folder; None: the one shipped for the base.")
    encoder: str | None = Field(None, description="None: the generator's.")
    home: str | None = Field(None, description="Folder of adapters and weights; None: DND_HOME, else the user's.")
    device: str = Field("auto", description="auto, cpu, cuda, ...")
    dtype: str = Field("auto", description="auto, float32, bfloat16 or float16.")
    adapter: str | None = Field(AUTO, description='An adapter\'s name, "auto" (routed per request) or None (the base).')
    observe: bool = Field(False, description='Learn the tasks from the requests answered with "auto"; see DnD.observe.')
    temperature: float = Field(0.0, description="0 is greedy.")
    top_p: float = Field(1.0, description="Nucleus mass, used when temperature > 0.")
    top_k: int = Field(0, description="0 keeps every token.")
    min_p: float = Field(0.0, description="Least share of the likeliest token's probability, when temperature > 0.")
    repetition_penalty: float = Field(1.0, description="Above 1, tokens of prompt and answer become less likely.")
    stop: list[str] = Field(default_factory=list, description="Text is cut before the first of these.")
    seed: int | None = Field(None, description="None draws fresh randomness.")


def model_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a constructor by their own names, an adapter as its name; raises `ConfigError` for bad sampling."""
    settings = renamed(given)
    if isinstance(settings.get("adapter"), Adapter):
        settings["adapter"] = settings["adapter"].name
    own = SamplingOptions(**{k: settings[k] for k in SAMPLING if k in settings})
    return settings | {k: getattr(own, k) for k in SAMPLING if k in settings}
