"""Files as arrays over lazy buffers: what a header says is read, elements are when they are used.

============  ============================  =======================================
npy, npz      `load_npy`, `load_npz`        NumPy's own (`aiouffd.formats.npy`)
GGUF          `load_gguf`                   models of ggml (`aiouffd.formats.gguf`)
safetensors   `aiouffd.safetensors.load`
============  ============================  =======================================

Each has a twin for buffers of `aiouffd.sync`, with ``_sync`` at the end of its name. What files say
is not believed: everything that would lead out of the file, or take more memory than the file's
size explains, is a `FormatError`.
"""

from .gguf import GgufInfo as GgufInfo
from .gguf import GgufTensors as GgufTensors
from .gguf import SyncGgufTensors as SyncGgufTensors
from .gguf import load_gguf as load_gguf
from .gguf import load_gguf_sync as load_gguf_sync
from .npy import ArrayInfo as ArrayInfo
from .npy import Arrays as Arrays
from .npy import SyncArrays as SyncArrays
from .npy import load_npy as load_npy
from .npy import load_npy_sync as load_npy_sync
from .npy import load_npz as load_npz
from .npy import load_npz_sync as load_npz_sync

__all__ = [
    "ArrayInfo",
    "Arrays",
    "GgufInfo",
    "GgufTensors",
    "SyncArrays",
    "SyncGgufTensors",
    "load_gguf",
    "load_gguf_sync",
    "load_npy",
    "load_npy_sync",
    "load_npz",
    "load_npz_sync",
]
