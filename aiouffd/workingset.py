"""Which parts of an object were needed: see `aiouffd.fetch.workingset`."""

from .fetch.workingset import (
    Recording as Recording,
)
from .fetch.workingset import (
    WorkingSet as WorkingSet,
)

__all__ = [
    "Recording",
    "WorkingSet",
]
