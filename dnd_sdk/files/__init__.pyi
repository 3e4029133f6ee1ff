from .atomic import (
    replacing as replacing,
    storage_errors as storage_errors,
    sweep as sweep,
    write_atomic as write_atomic,
)
from .line_log import LineLog as LineLog
from .locks import locked as locked
from .untrusted import (
    FLOATS as FLOATS,
    MAX_HEADER_BYTES as MAX_HEADER_BYTES,
    SafetensorsReader as SafetensorsReader,
    TensorInfo as TensorInfo,
    is_finite_number as is_finite_number,
    open_regular as open_regular,
    open_safetensors as open_safetensors,
    read_json as read_json,
)
