"""The base class of what exports its memory: ``numpy.frombuffer(buf)``, ``memoryview(buf)``.

A class of C, because before Python 3.12 no class of Python can do that, and because from then on
`PEP 688 <https://peps.python.org/pep-0688/>`_ lets go of memory that `torch.frombuffer` holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..kernel.lib import in_main_interpreter, lib

__all__ = ["Exporter"]

if TYPE_CHECKING:

    class Exporter:
        """`_export` of a subclass returns a memoryview of the memory that it exports."""

        def _export(self) -> memoryview: ...

        def __buffer__(self, flags: int, /) -> memoryview: ...

elif not in_main_interpreter():

    class Exporter:
        """Nothing can be opened here; see rescue.py."""

        __slots__ = ()  # as the class of C, so that subclasses may have theirs

elif lib.au_python_exporter(__name__.encode()):
    raise ImportError("the class of exported memory could not be made")
