"""aiouffd: memory that fills itself.

This is the front door: names that programs use. The layers behind it are folders, of which
CONTRIBUTING.md has the map.
"""

from typing import TYPE_CHECKING, Any

# First: where the native module cannot be, this says why, and what comes next would say less.
from .kernel import lib as _lib  # isort: skip  # noqa: F401

from . import sync as sync
from .attach import Attachment as Attachment
from .attach import attach as attach
from .buffers.buffer import BufferStats as BufferStats
from .buffers.buffer import LazyBuffer as LazyBuffer
from .buffers.buffer import open as open
from .buffers.file import BufferFile as BufferFile
from .buffers.sync import open_file as open_file
from .errors import AiouffdError as AiouffdError
from .errors import BlockingTouchWarning as BlockingTouchWarning
from .errors import ClosedError as ClosedError
from .errors import FlushError as FlushError
from .errors import FormatError as FormatError
from .errors import InternalError as InternalError
from .errors import KernelError as KernelError
from .errors import PeerError as PeerError
from .errors import RangeNotSupportedError as RangeNotSupportedError
from .errors import ShortReadError as ShortReadError
from .errors import SourceChangedError as SourceChangedError
from .errors import SourceError as SourceError
from .errors import SourceTimeoutError as SourceTimeoutError
from .errors import StalledError as StalledError
from .errors import UnsupportedError as UnsupportedError
from .errors import UnversionedSourceWarning as UnversionedSourceWarning
from .errors import UsageError as UsageError
from .fetch.fetcher import FlightEvent as FlightEvent
from .fetch.workingset import Recording as Recording
from .fetch.workingset import WorkingSet as WorkingSet
from .headers import include_dir as include_dir
from .kernel.abi import Feature as Feature
from .kernel.abi import Mode as Mode
from .kernel.probe import probe as probe
from .kernel.uffd import Userfaultfd as Userfaultfd
from .regions.fault import Fault as Fault
from .regions.pager import Pager as Pager
from .regions.region import Region as Region
from .sources import Source as Source
from .version import VERSION

__all__ = [
    "AiouffdError",
    "Attachment",
    "BlockingTouchWarning",
    "BufferFile",
    "BufferStats",
    "ClosedError",
    "Fault",
    "Feature",
    "FlightEvent",
    "FlushError",
    "FormatError",
    "InternalError",
    "KernelError",
    "LazyBuffer",
    "Mode",
    "Pager",
    "PeerError",
    "RangeNotSupportedError",
    "Recording",
    "Region",
    "ShortReadError",
    "Source",
    "SourceChangedError",
    "SourceError",
    "SourceTimeoutError",
    "StalledError",
    "UnsupportedError",
    "UnversionedSourceWarning",
    "UsageError",
    "Userfaultfd",
    "WorkingSet",
    "attach",
    "include_dir",
    "open",
    "open_file",
    "probe",
    "sync",
]

__version__ = VERSION

if TYPE_CHECKING:
    from . import formats as formats
    from . import safetensors as safetensors
    from . import serve as serve
else:

    def __getattr__(name: str) -> Any:
        # Loaded when it is asked for: most who need a buffer need none of them.
        if name in ("formats", "safetensors", "serve"):
            from importlib import import_module

            return import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
