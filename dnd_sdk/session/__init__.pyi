from .calls import (
    MAX_THREADS as MAX_THREADS,
    Call as Call,
    Lazy as Lazy,
    Part as Part,
    check_whole as check_whole,
    in_thread as in_thread,
    who_answers as who_answers,
)
from .choosing import AUTO as AUTO, AdapterChoice as AdapterChoice
from .fields import ModelFields as ModelFields, model_settings as model_settings
from .options import (
    ALIASES as ALIASES,
    as_config_error as as_config_error,
    call_options as call_options,
    check_known as check_known,
    renamed as renamed,
)
from .results import (
    AdaptResult as AdaptResult,
    Completion as Completion,
    Limits as Limits,
    ObserveResult as ObserveResult,
)
from .session import DnD as DnD
from .stream import CompletionStream as CompletionStream, Submitted as Submitted
