"""Arrays and tensors over the memory of a lazy buffer, which they hold.

They are made by the buffer protocol alone, whose exports are counted: what NumPy's
``__array_interface__`` gives away is an address, and nobody would hear of its users.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ..errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

__all__ = ["Order", "Shape", "array_over", "tensor_over"]

#: The lengths of the axes, or of the only one; None is as many elements as there are.
Shape: TypeAlias = int | Iterable[int] | None


#: Which axis lies together in memory: the last, or the first.
Order: TypeAlias = Literal["C", "F"]


def array_over(
    memory: memoryview,
    dtype: Any,
    shape: Shape,
    offset: int,
    order: Order = "C",
    strides: Iterable[int] | None = None,
) -> Array:
    """See `ByteSequence.array`."""
    try:
        import numpy
    except ImportError:
        raise UnsupportedError("arrays need NumPy", hint="pip install numpy") from None
    try:
        kind = numpy.dtype(dtype)
    except TypeError:
        kind = _of_ml_dtypes(dtype)
    if kind.hasobject:
        raise UsageError(f"memory holds no Python objects, and {kind} has some")
    if not kind.itemsize:
        raise UsageError(f"elements of {kind} have no bytes", hint="give their length, as in 'S8'")
    if order not in ("C", "F"):
        raise UsageError(f"order is 'C' or 'F', not {order!r}")
    if strides is not None:
        lengths, steps = _strided(shape, strides, kind.itemsize, offset, memory.nbytes)
        return numpy.ndarray(lengths, kind, buffer=memory, offset=offset, strides=steps)
    lengths = _lengths(shape, kind.itemsize, offset, memory.nbytes)
    return numpy.ndarray(lengths, kind, buffer=memory, offset=offset, order=order)


def _of_ml_dtypes(dtype: Any) -> np.dtype[Any]:
    """What NumPy does not know by its name: bfloat16, and floats of eight bits."""
    import numpy

    try:
        import ml_dtypes

        found: np.dtype[Any] = numpy.dtype(getattr(ml_dtypes, dtype))
        return found
    except ImportError:
        hint = "bfloat16 and floats of eight bits need ml_dtypes: pip install 'ml_dtypes>=0.5'"
    except (AttributeError, TypeError):
        hint = "a dtype of NumPy or ml_dtypes, or its name: 'f4', 'bfloat16'"
    raise UsageError(f"{dtype!r} is no type of elements", hint=hint) from None


def tensor_over(memory: memoryview, dtype: Any, shape: Shape, offset: int) -> torch.Tensor:
    """See `LazyBuffer.tensor`. ``memory`` has to call itself writable, whatever it is: torch has
    no tensors that are not, and warns."""
    try:
        import torch
    except ImportError:
        raise UnsupportedError("tensors need torch", hint="pip install torch") from None
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(kind, torch.dtype):
        raise UsageError(
            f"{dtype!r} is no type of elements", hint="a dtype of torch or its name: 'float32'"
        )
    lengths = _lengths(shape, kind.itemsize, offset, memory.nbytes)
    count = math.prod(lengths)
    if not count:
        return torch.empty(lengths, dtype=kind)
    # Not in inference mode: torch does refuse to change such tensors, but after it has written.
    flat = torch.frombuffer(memory, dtype=kind, count=count, offset=offset)
    return flat.reshape(lengths)


def _lengths(shape: Shape, item: int, offset: int, size: int) -> tuple[int, ...]:
    """``shape`` as a tuple that fits behind byte ``offset`` of ``size`` bytes."""
    if not 0 <= offset <= size:
        raise UsageError(f"offset {offset} is not within the {size} bytes of the buffer")
    if shape is None:
        count, rest = divmod(size - offset, item)
        if rest:
            raise UsageError(
                f"the {size - offset} bytes from {offset} on are no whole number of elements of"
                f" {item} bytes",
                hint="give a shape",
            )
        return (count,)
    lengths = _sizes(shape)
    needed = math.prod(lengths) * item
    if needed > size - offset:
        raise UsageError(
            f"elements of {item} bytes and the shape {lengths} take {needed} bytes, and from"
            f" {offset} on there are {size - offset}"
        )
    return lengths


def _sizes(shape: int | Iterable[int]) -> tuple[int, ...]:
    lengths = tuple(map(operator.index, shape if isinstance(shape, Iterable) else (shape,)))
    if any(length < 0 for length in lengths):
        raise UsageError(f"a shape has no negative lengths: {lengths}")
    if any(length > sys.maxsize for length in lengths):
        raise UsageError(f"the shape {lengths} is too long")
    return lengths


def _strided(
    shape: Shape, strides: Iterable[int], item: int, offset: int, size: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """``shape`` and ``strides`` as tuples, all of whose elements are among the ``size`` bytes."""
    if shape is None:
        raise UsageError("strides need a shape")
    lengths, steps = _sizes(shape), tuple(map(operator.index, strides))
    if len(lengths) != len(steps):
        raise UsageError(f"the shape {lengths} has not as many axes as the strides {steps}")
    if any(abs(step) > sys.maxsize for step in steps):
        raise UsageError(f"the strides {steps} lead too far")
    ways = [(length - 1) * step for length, step in zip(lengths, steps, strict=True)]
    low, high = offset, offset
    if all(lengths):
        low += sum(way for way in ways if way < 0)
        high += sum(way for way in ways if way > 0) + item
    if low < 0 or high > size:
        raise UsageError(
            f"the shape {lengths} with the strides {steps} from {offset} on takes bytes {low} to"
            f" {high}, and there are {size}"
        )
    return lengths, steps
