"""What pointers to numbers and to bytes are called.

cffi's objects have no types that a checker knows, and what it takes for a pointer depends on the
type: an array, what ``ffi.from_buffer`` or ``ffi.new`` gives, NULL. So these only tell a reader.
"""

from __future__ import annotations

from typing import Any, TypeAlias

__all__ = ["Bytes", "Int64s", "Ints", "Pointer", "Text", "Uint32s", "Uint64s"]

#: Anything that cffi takes for a pointer.
Pointer: TypeAlias = Any

Bytes: TypeAlias = Pointer
Int64s: TypeAlias = Pointer
Ints: TypeAlias = Pointer
Uint32s: TypeAlias = Pointer
Uint64s: TypeAlias = Pointer
#: Characters up to a NUL; also given by what returns them.
Text: TypeAlias = Pointer
