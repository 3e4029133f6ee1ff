from .embedded import (
    DEFAULT_BASE as DEFAULT_BASE,
    DEFAULT_ENCODER as DEFAULT_ENCODER,
    EMBEDDED as EMBEDDED,
    damaged_files as damaged_files,
    is_pulled as is_pulled,
    list_models as list_models,
)
from .encoder import Encoded as Encoded, Encoder as Encoder
from .loading import Base as Base, load_base as load_base, pick_device as pick_device, pull as pull, resolve as resolve
