from .choosing import AUTO as AUTO, AdapterChoice as AdapterChoice
from .options import ALIASES as ALIASES, call_options as call_options, check_known as check_known, renamed as renamed
from .results import (
    AdaptResult as AdaptResult,
    Completion as Completion,
    Limits as Limits,
    ObserveResult as ObserveResult,
)
from .session import DnD as DnD
from .stream import CompletionStream as CompletionStream, Submitted as Submitted
