"""The kernel's interface itself, typed: see `aiouffd.kernel.uffd`."""

from .kernel.uffd import (
    Attempt as Attempt,
)
from .kernel.uffd import (
    CreationError as CreationError,
)
from .kernel.uffd import (
    CreationPermissionError as CreationPermissionError,
)
from .kernel.uffd import (
    Userfaultfd as Userfaultfd,
)
from .kernel.uffd import (
    address_of as address_of,
)
from .kernel.uffd import (
    kernel_features as kernel_features,
)

__all__ = [
    "Attempt",
    "CreationError",
    "CreationPermissionError",
    "Userfaultfd",
    "address_of",
    "kernel_features",
]
