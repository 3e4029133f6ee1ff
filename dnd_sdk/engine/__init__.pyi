from .backend import Backend as Backend, local_engine as local_engine
from .bank import SlotBank as SlotBank
from .engine import Engine as Engine
from .fake import FakeBackend as FakeBackend
from .prefix import Prefix as Prefix, shared_prefix as shared_prefix
from .request import CompletionRequest as CompletionRequest
from .resident import Resident as Resident, default_slots as default_slots
from .scoring import OptionScores as OptionScores, option_logprobs as option_logprobs
from .stream import TextStream as TextStream
from .text import FinishReason as FinishReason, Generation as Generation, TokenLogprob as TokenLogprob
from .vllm import MAX_LOADED as MAX_LOADED, VllmBackend as VllmBackend
from .vllm_local import LocalVllmBackend as LocalVllmBackend, check_vllm_local as check_vllm_local
