from .atomic import (
    is_left as is_left,
    is_old as is_old,
    replacing as replacing,
    storage_errors as storage_errors,
    sweep as sweep,
    write_atomic as write_atomic,
)
from .line_log import LineLog as LineLog
from .locks import file_system as file_system, locked as locked, reach as reach
from .tensors import (
    FLOATS as FLOATS,
    MAX_HEADER_BYTES as MAX_HEADER_BYTES,
    FloatArray as FloatArray,
    SafetensorsReader as SafetensorsReader,
    TensorInfo as TensorInfo,
    all_finite as all_finite,
    open_safetensors as open_safetensors,
    safetensors_header as safetensors_header,
)
from .untrusted import (
    is_finite_number as is_finite_number,
    open_regular as open_regular,
    plain_only as plain_only,
    read_json as read_json,
)
