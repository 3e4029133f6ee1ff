from .batching import grouped as grouped
from .card import BaseCard as BaseCard
from .catalogue import (
    DEFAULT_BASE as DEFAULT_BASE,
    DEFAULT_ENCODER as DEFAULT_ENCODER,
    EMBEDDED as EMBEDDED,
    SMALL_BASE as SMALL_BASE,
    embedded_base as embedded_base,
)
from .embedded import (
    ModelInfo as ModelInfo,
    damaged_files as damaged_files,
    is_pulled as is_pulled,
    list_models as list_models,
)
from .encoder import Encoded as Encoded, Encoder as Encoder, EncoderSettings as EncoderSettings
from .loading import (
    Base as Base,
    fingerprint as fingerprint,
    load_base as load_base,
    load_encoder as load_encoder,
    pick_device as pick_device,
    pick_dtype as pick_dtype,
    pull as pull,
    resolve as resolve,
)
from .tokenizers import local_tokenizer as local_tokenizer
from .wheels import Fetching as Fetching
