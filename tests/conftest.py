"""What every test gets: both event loops, leak counters, and no error that goes unseen.

- A coroutine test runs on asyncio's loop and on uvloop's.
- After each test the native counters of live engines, regions and slots are back where they were.
- A call of a test loop's exception handler fails the test, unless it asks for ``loop_errors``.
- No test asks its own servers through a proxy that the environment names.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvloop

from tests.support import Counters, read_counters

LOOPS = ("asyncio", "uvloop")
LIVE = ("live_engines", "live_regions", "live_slots")
#: Seconds in which threads of the test that were just let go may leave the kernel.
SETTLE = 2.0

_errors: list[dict[str, Any]] = []

for _name in [*os.environ]:
    if _name.lower() in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        del os.environ[_name]


def _watched(factory: Callable[[], asyncio.AbstractEventLoop]) -> Callable[[], Any]:
    def make() -> asyncio.AbstractEventLoop:
        loop = factory()
        loop.set_exception_handler(lambda _loop, context: _errors.append(context))
        return loop

    return make


def pytest_asyncio_loop_factories(
    config: Any, item: Any
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {
        "asyncio": _watched(asyncio.new_event_loop),
        "uvloop": _watched(uvloop.new_event_loop),
    }


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--one-loop",
        action="store_true",
        help="each test on one of the two loops, half of them on either",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With ``--one-loop`` leave out one of the two twins of a test that differ by their loop."""
    if not config.getoption("--one-loop"):
        return
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        stem, _, parameters = item.nodeid.partition("[")
        words = parameters.rstrip("]").split("-")
        loops = [word for word in words if word in LOOPS]
        rest = [word for word in words if word not in LOOPS]
        chosen = LOOPS[zlib.crc32("-".join([stem, *rest]).encode()) % len(LOOPS)]
        (dropped if len(loops) == 1 and loops != [chosen] else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


@pytest.fixture(params=LOOPS)
def loop_name(request: pytest.FixtureRequest) -> str:
    """Name of the loop for tests that run a program of their own; see `support.run`."""
    return str(request.param)


@pytest.fixture
def loop_errors() -> list[dict[str, Any]]:
    """Contexts that the test loop's exception handler was called with; they are expected."""
    return _errors


@pytest.fixture
def counters() -> Counters:
    """What the native counters moved by since the test began."""
    return Counters()


@pytest.fixture(autouse=True)
def _loop_errors_fail(request: pytest.FixtureRequest) -> Iterator[None]:
    _errors.clear()
    yield
    seen, expected = list(_errors), "loop_errors" in request.fixturenames
    _errors.clear()
    if seen and not expected:
        pytest.fail(f"the loop's exception handler was called: {seen}")


def _leaked(before: dict[str, int]) -> dict[str, int]:
    now = read_counters()
    return {name: now[name] - before[name] for name in LIVE if now[name] > before[name]}


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    before = read_counters()
    yield
    limit = time.monotonic() + SETTLE
    while _leaked(before):
        gc.collect()
        if not (leaked := _leaked(before)):
            break
        if time.monotonic() > limit:
            pytest.fail(f"native objects leaked: {leaked}")
        time.sleep(0.005)
