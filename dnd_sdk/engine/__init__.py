"""The resident base LLM: adapters in slots, completion, streaming and option scoring."""

from dnd_sdk.engine.bank import SlotBank
from dnd_sdk.engine.engine import Engine
from dnd_sdk.engine.scoring import OptionScores, option_logprobs
from dnd_sdk.engine.stream import TextStream
from dnd_sdk.engine.text import Generation

__all__ = ["Engine", "Generation", "OptionScores", "SlotBank", "TextStream", "option_logprobs"]
