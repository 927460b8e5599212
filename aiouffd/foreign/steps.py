"""Work in steps, each of which is quick, so that others have their turn between them."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any, TypeAlias, TypeVar

__all__ = ["Steps", "at_once", "in_steps"]

T = TypeVar("T")
#: Work in steps; its value is what the work was for.
Steps: TypeAlias = Generator[None, None, T]


def at_once(steps: Steps[T]) -> T:
    """All steps, one after the other."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            value: Any = end.value
            return value  # type: ignore[no-any-return]


async def in_steps(steps: Steps[T]) -> T:
    """All steps, and between them the turn of others."""
    try:
        while True:
            try:
                next(steps)
            except StopIteration as end:
                value: Any = end.value
                return value  # type: ignore[no-any-return]
            await asyncio.sleep(0)
    finally:
        steps.close()
