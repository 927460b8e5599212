"""aiouffd: memory that fills itself.

Layers, each importing only from those below it::

    cli, doctor               the command line
    attach                    memory of ours that another process fills
    safetensors, formats      what a file holds, as arrays over a lazy buffer
    serve                     faults of other processes
    sync, buffer              lazy buffers: what most people use
    file, arrays, saving      a lazy buffer as a file, as arrays, in a file
    copying, destination      whole objects, and what they become
    fetcher, transfer         from a source to the pages of a region; looking ahead
    flights, policy           the fetch engine: single flight, retries, deadlines
    workingset                which parts were needed, in which order
    sources, nbd              where bytes come from, and serving them by NBD
    guarded                   copies and searches that signals interrupt
    pager, region, rescue     the fault-serving framework and its second loop
    places, unix_sockets      who decides what a path means, and who listens there
    uffd, abi, probe          the kernel ABI, typed
    _native                   the C core (native/)
"""

from typing import TYPE_CHECKING, Any

from . import sync as sync
from .abi import Feature as Feature
from .abi import Mode as Mode
from .attach import Attachment as Attachment
from .attach import attach as attach
from .buffer import BufferStats as BufferStats
from .buffer import LazyBuffer as LazyBuffer
from .buffer import open as open
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
from .fault import Fault as Fault
from .fetcher import FlightEvent as FlightEvent
from .file import BufferFile as BufferFile
from .headers import include_dir as include_dir
from .pager import Pager as Pager
from .probe import probe as probe
from .region import Region as Region
from .sources import Source as Source
from .sync import open_file as open_file
from .uffd import Userfaultfd as Userfaultfd
from .version import VERSION
from .workingset import Recording as Recording
from .workingset import WorkingSet as WorkingSet

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
