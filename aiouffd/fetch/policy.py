"""What is done when bytes do not come: for everybody who fetches."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import SourceChangedError, SourceError, UsageError
from ..regions.fault import Errors

__all__ = ["KERNEL_PATIENCE", "Policy"]

#: Seconds for which errors="soft" takes errors of the kernel for passing ones, deadline or not.
KERNEL_PATIENCE = 5.0
#: What a source raises that is used wrongly. Other bugs may depend on what a server has answered.
_MISUSE = (UsageError, NotImplementedError)


@dataclass(frozen=True, slots=True)
class Policy:
    """Whether and for how long a failed fetch is tried again.

    ``deadline`` is in seconds and counts from when somebody began to wait for the bytes; it is
    for "soft". None: whatever may pass is tried again for ever.
    """

    errors: Errors = "hard"
    deadline: float | None = None

    @property
    def limit(self) -> float | None:
        """Seconds after which a wait has failed, if it ever does."""
        return None if self.errors == "hard" else self.deadline

    def is_final(self, error: SourceError, waited: float, refused: float) -> bool:
        """Whether ``error`` ends a fetch that somebody has waited for ``waited`` seconds.

        ``refused``: seconds for which the kernel has not taken the bytes.
        """
        if isinstance(error, SourceChangedError):
            return True  # the bytes that were promised do not exist any more
        if isinstance(error.__cause__, _MISUSE) and not error.transient:
            return True  # the program has to be another one
        if self.errors == "hard":
            return False
        if not error.transient or refused >= KERNEL_PATIENCE:
            return True
        return self.deadline is not None and waited >= self.deadline
