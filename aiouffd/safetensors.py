"""The tensors of safetensors files: see `aiouffd.formats.safetensors`."""

from .formats.safetensors import (
    FormatError as FormatError,
)
from .formats.safetensors import (
    Header as Header,
)
from .formats.safetensors import (
    SyncTensors as SyncTensors,
)
from .formats.safetensors import (
    TensorInfo as TensorInfo,
)
from .formats.safetensors import (
    Tensors as Tensors,
)
from .formats.safetensors import (
    load as load,
)
from .formats.safetensors import (
    load_shards as load_shards,
)
from .formats.safetensors import (
    load_shards_sync as load_shards_sync,
)
from .formats.safetensors import (
    load_sync as load_sync,
)
from .formats.safetensors import (
    parse_header as parse_header,
)
from .formats.safetensors import (
    parse_index as parse_index,
)

__all__ = [
    "FormatError",
    "Header",
    "SyncTensors",
    "TensorInfo",
    "Tensors",
    "load",
    "load_shards",
    "load_shards_sync",
    "load_sync",
    "parse_header",
    "parse_index",
]
