"""The resident base LLM: adapters in slots, completion, streaming and option scoring."""

from dnd_sdk.engine.bank import SlotBank
from dnd_sdk.engine.chat import Tools, check_renders_tools, renders_tools
from dnd_sdk.engine.engine import Engine
from dnd_sdk.engine.label_calibration import Calibrated, LabelCalibration
from dnd_sdk.engine.scoring import OptionScores, option_logprobs
from dnd_sdk.engine.stream import TextStream
from dnd_sdk.engine.text import Generation

__all__ = [
    "Calibrated",
    "Engine",
    "Generation",
    "LabelCalibration",
    "OptionScores",
    "SlotBank",
    "TextStream",
    "Tools",
    "check_renders_tools",
    "option_logprobs",
    "renders_tools",
]
