from .observer import ObserveResult as ObserveResult, Observer as Observer
from .prompt_stream import (
    MAX_KEPT_CHARS as MAX_KEPT_CHARS,
    PromptStream as PromptStream,
    StreamSettings as StreamSettings,
)
