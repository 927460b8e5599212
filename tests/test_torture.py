"""Ten thousand random operations on a buffer whose source fails in every way, and no wrong byte.

The seed is part of each test's name in the report; ``AIOUFFD_SEED`` repeats one.
"""

from __future__ import annotations

import os
import random

import pytest

from tests.scenarios import torture
from tests.support import result_of

SEED = int(os.environ.get("AIOUFFD_SEED") or random.SystemRandom().randrange(10**6))


@pytest.fixture(autouse=True)
def _say_the_seed() -> None:
    # Captured, and so shown only when the test fails.
    print(f"AIOUFFD_SEED={SEED}")


def check(found: dict[str, object], operations: int) -> None:
    print(found)
    assert int(str(found["done"])) + int(str(found["refused"])) >= 0.8 * operations
    assert int(str(found["retries"])) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "memory", "operations"),
    [
        ("plain", "anonymous", 10_000),
        ("full", "anonymous", 10_000),
        ("full", "memfd", 4_000),
        ("http", "anonymous", 2_000),
    ],
)
def test_hard(loop_name: str, kind: str, memory: str, operations: int) -> None:
    found = result_of(
        torture.torture, loop_name, kind, memory, "hard", operations, SEED, limit=60.0
    )
    check(found, operations)
    assert found["refused"] == found["failures"] == 0
    assert {"read", "raw", "memcpy", "sum", "drop", "pin", "cancel"} <= set(found["kinds"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "operations"), [("plain", 4_000), ("full", 4_000), ("http", 1_000)]
)
def test_soft(loop_name: str, kind: str, operations: int) -> None:
    """Errors are allowed, wrong bytes are not, and in fair weather everything heals."""
    found = result_of(
        torture.torture, loop_name, kind, "anonymous", "soft", operations, SEED, limit=60.0
    )
    check(found, operations)
