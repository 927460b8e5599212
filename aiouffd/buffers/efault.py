"""EFAULT of system calls on lazy memory, explained where Python shows it.

Who gets it are other people's functions (``file.write(buf.view)``, ``sock.send``, ``np.save``), so
that no error of ours can say why. The exception that leaves the ``with`` block of the memory gets a
note, which tracebacks show.
"""

from __future__ import annotations

import errno
import re

__all__ = ["explain"]

#: What NumPy's tofile() and save() make of it, without an errno.
_NUMPY = re.compile(r"\d+ requested and \d+ written")

_USER_MODE_ONLY = (
    "aiouffd: if a system call got memory of {name}: without privileges it fails with EFAULT where"
    " bytes are missing, instead of waiting for them. `{fetch}` brings them before the call,"
    " `{save}` writes a file; `aiouffd doctor` says what this user would need"
)
_FAILED = (
    "aiouffd: if a system call got memory of {name}: some of its bytes could not be had"
    " ({why}), and calls on them fail with EFAULT. `{fetch}` tries again"
)


def explain(
    error: object,
    name: str,
    *,
    user_mode_only: bool,
    failed: str | None,
    fetch: str,
    save: str,
) -> None:
    """Add a note to ``error``, an exception or none, if it, or one in its group, or what it was
    raised from, may be this EFAULT.

    Args:
        failed: Why some bytes could not be had, or None if none of them.
        fetch: What brings them.
        save: What writes a file.
    """
    if not isinstance(error, BaseException) or not _is_efault(error, set()):
        return
    text = _FAILED if failed is not None else _USER_MODE_ONLY if user_mode_only else None
    if text is None:
        return
    note = text.format(name=name, fetch=fetch, save=save, why=failed)
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


def _is_efault(error: BaseException, seen: set[int]) -> bool:
    if id(error) in seen:
        return False
    seen.add(id(error))
    if isinstance(error, BaseExceptionGroup):
        return any(_is_efault(each, seen) for each in error.exceptions)
    if isinstance(error, OSError) and (
        error.errno == errno.EFAULT or (error.errno is None and _NUMPY.search(str(error)))
    ):
        return True
    return any(
        _is_efault(each, seen) for each in (error.__cause__, error.__context__) if each is not None
    )
