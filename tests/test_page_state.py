"""The states of a region's pages against a model: whatever is done, in whatever order.

The loop of these pagers never runs, so nothing but the rules below changes a page. Memory is
read only where the model says that it is present; anything else would wait for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import gc
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import aiouffd
from aiouffd import ClosedError, KernelError, UsageError
from aiouffd.kernel.lib import PAGE_SIZE, lib
from tests.faulty import HUGE, huge_pages

MISSING, RESIDENT, POISONED = "missing", "resident", "poisoned"
PAGES = 22


class Engine:
    """One pager for a whole run of the machine; on a loop that stands still."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.pager = aiouffd.Pager()
        self.loop.run_until_complete(self._open())

    async def _open(self) -> None:
        self.pager.open()

    def close(self) -> None:
        self.loop.run_until_complete(self.pager.aclose())
        self.loop.close()


def numbered(number: int, length: int) -> bytes:
    """Bytes that are found nowhere else, and none of them zero."""
    unit = (1 + number % 200).to_bytes(1, "little") + number.to_bytes(7, "little").replace(
        b"\0", b"\xff"
    )
    return (unit * (length // 8 + 1))[:length]


class PageStates(RuleBasedStateMachine):
    engine: ClassVar[Engine]
    kind: ClassVar[Any] = "anonymous"
    page: ClassVar[int] = PAGE_SIZE
    pages: ClassVar[int] = PAGES
    block_pages: ClassVar[list[int]] = [1, 2, 4, 8]

    region: aiouffd.Region | None = None
    number = 0

    @initialize(data=st.data())
    def map(self, data: st.DataObject) -> None:
        self.block = data.draw(st.sampled_from(self.block_pages), "pages per block")
        self.tail = data.draw(st.sampled_from([0, 1, 77, self.page - 1]), "tail")
        count = data.draw(st.integers(1, self.pages), "pages")
        self.length = count * self.page - self.tail
        if self.length <= 0:
            self.length = self.page
        self.region = self.engine.pager.map(
            self.length, kind=self.kind, block_size=self.block * self.page
        )
        self.count = -(-self.length // self.page)
        self.states = [MISSING] * self.count
        self.contents: list[bytes] = [b""] * self.count
        self.blocks = -(-self.count // self.block)
        self.flying = [False] * self.blocks
        assert self.region.blocks == self.blocks
        assert self.region.mapped_length == self.count * self.page

    def teardown(self) -> None:
        if self.region is not None:
            self.region.close()
            self.region = None
            gc.collect(0)

    # ---------------------------------------------------------------- helpers

    def range(self, data: st.DataObject) -> tuple[int, int]:
        first = data.draw(st.integers(0, self.count - 1), "first page")
        return first, data.draw(st.integers(first + 1, self.count), "stop page")

    def land(self, first: int, stop: int) -> None:
        """Blocks that are complete are no longer in flight."""
        for block in range(first // self.block, (stop - 1) // self.block + 1):
            pages = self.states[block * self.block : (block + 1) * self.block]
            if MISSING not in pages:
                self.flying[block] = False

    def settle(self, page: int, state: str, content: bytes, heal: bool) -> None:
        if self.states[page] == MISSING or (
            heal and state == RESIDENT and self.states[page] == POISONED
        ):
            self.states[page], self.contents[page] = state, content

    # ------------------------------------------------------------------ rules

    @rule(data=st.data(), heal=st.booleans(), over=st.booleans())
    def install(self, data: st.DataObject, heal: bool, over: bool) -> None:
        """Whole pages, or up to the unaligned end; sometimes more than the end."""
        assert self.region is not None
        first, stop = self.range(data)
        self.number += 1
        length = (stop - first) * self.page
        content = numbered(self.number, length)
        given = content
        if stop == self.count and not over:
            given = content[: self.length - first * self.page]
        assert self.region.install(first * self.page, given, heal=heal) == len(given)
        for page in range(first, stop):
            bytes_ = content[(page - first) * self.page : (page - first + 1) * self.page]
            if page == self.count - 1:
                bytes_ = bytes_[: self.length - page * self.page].ljust(self.page, b"\0")
            self.settle(page, RESIDENT, bytes_, heal)
        self.land(first, stop)

    @rule(data=st.data(), heal=st.booleans())
    def zero(self, data: st.DataObject, heal: bool) -> None:
        assert self.region is not None
        first, stop = self.range(data)
        length = (stop - first) * self.page
        assert self.region.zero(first * self.page, length, heal=heal) == length
        for page in range(first, stop):
            self.settle(page, RESIDENT, bytes(self.page), heal)
        self.land(first, stop)

    @rule(data=st.data())
    def poison(self, data: st.DataObject) -> None:
        assert self.region is not None
        first, stop = self.range(data)
        length = (stop - first) * self.page
        assert self.region.poison(first * self.page, length) == length
        for page in range(first, stop):
            self.settle(page, POISONED, b"", False)
        self.land(first, stop)

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        assert self.region is not None
        first, stop = self.range(data)
        self.region.drop(first * self.page, (stop - first) * self.page)
        for page in range(first, stop):
            if self.states[page] == RESIDENT:
                self.states[page], self.contents[page] = MISSING, b""

    @rule(data=st.data(), heal=st.booleans())
    def begin(self, data: st.DataObject, heal: bool) -> None:
        assert self.region is not None
        first = data.draw(st.integers(0, self.blocks - 1), "first block")
        stop = data.draw(st.integers(first, self.blocks), "stop block")
        expected = []
        for block in range(first, stop):
            pages = self.states[block * self.block : (block + 1) * self.block]
            open_ = {MISSING, POISONED} if heal else {MISSING}
            if not self.flying[block] and open_ & set(pages):
                expected.append(block)
                self.flying[block] = True
        assert self.region.begin(first, stop - first, heal=heal) == expected

    @rule(data=st.data(), keep=st.booleans())
    def end(self, data: st.DataObject, keep: bool) -> None:
        """Nobody touches anything here, so no block is wanted."""
        assert self.region is not None
        first = data.draw(st.integers(0, self.blocks - 1), "first block")
        stop = data.draw(st.integers(first, self.blocks), "stop block")
        assert self.region.end(first, stop - first, keep_wanted=keep) == []
        for block in range(first, stop):
            self.flying[block] = False

    @rule(data=st.data())
    def install_for_a_generation(self, data: st.DataObject) -> None:
        """An answer to a question that is out of date changes nothing."""
        assert self.region is not None
        page = data.draw(st.integers(0, self.count - 1), "page")
        block = page // self.block
        generation = lib.au_region_generation(self.region._open_native(), block)
        self.number += 1
        content = numbered(self.number, self.page)
        with pytest.raises(KernelError) as caught:
            self.region.install(page * self.page, content, generation=(generation + 1) % 2**32)
        assert caught.value.errno == errno.ESTALE
        assert self.region.install(page * self.page, content, generation=generation) == self.page
        if page == self.count - 1:
            content = content[: self.length - page * self.page].ljust(self.page, b"\0")
        self.settle(page, RESIDENT, content, False)
        self.land(page, page + 1)

    @rule(data=st.data())
    def refused(self, data: st.DataObject) -> None:
        """Wrong arguments change nothing."""
        assert self.region is not None
        region, page = self.region, self.page
        wrong = [
            lambda: region.install(1, bytes(page)),
            lambda: region.install(0, b""),
            lambda: region.install(self.count * page, bytes(page)),
            lambda: region.install(0, bytes((self.count + 1) * page)),
            lambda: region.zero(page // 2, page),
            lambda: region.poison(0, (self.count + 1) * page),
            lambda: region.drop(1, page),
            lambda: region.drop(0, page - 1),
            lambda: region.drop(self.count * page, page),
            lambda: region.runs(0, (self.count + 1) * page),
            lambda: region.install(0, region.view),
        ]
        if self.length > page:
            wrong.append(lambda: region.install(0, bytes(page - 1)))
        with pytest.raises((UsageError, BufferError)):
            data.draw(st.sampled_from(wrong), "what")()

    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        assert self.region is not None
        first, stop = self.range(data)
        inside = self.states[first:stop]
        offset, length = first * self.page, (stop - first) * self.page
        assert self.region.is_resident(offset, length) == (set(inside) == {RESIDENT})
        # Any byte of a page stands for its page.
        assert self.region.is_resident(offset + self.page - 1, 1) == (inside[0] == RESIDENT)
        assert self.region.runs(offset, length) == runs_of(inside, first, self.page)

    @precondition(lambda self: self.region is not None and RESIDENT in self.states)
    @rule(data=st.data())
    def write_a_byte(self, data: st.DataObject) -> None:
        """The program's own writes stay, whatever is installed later."""
        assert self.region is not None
        resident = [page for page, state in enumerate(self.states) if state == RESIDENT]
        page = data.draw(st.sampled_from(resident), "page")
        at = page * self.page + data.draw(st.integers(0, self.page - 1), "offset")
        if at >= self.length:
            return
        value = data.draw(st.integers(0, 255), "value")
        self.region.view[at] = value
        content = bytearray(self.contents[page])
        content[at - page * self.page] = value
        self.contents[page] = bytes(content)

    # ------------------------------------------------------------- invariants

    @invariant()
    def states_agree(self) -> None:
        if self.region is None:
            return
        assert self.region.runs() == runs_of(self.states, 0, self.page)
        assert self.region.resident_bytes == self.states.count(RESIDENT) * self.page
        assert self.region.poisoned_bytes == self.states.count(POISONED) * self.page

    @invariant()
    def bytes_agree(self) -> None:
        if self.region is None:
            return
        for page, state in enumerate(self.states):
            if state == RESIDENT:
                found = ctypes.string_at(self.region.address + page * self.page, self.page)
                assert found == self.contents[page], f"page {page}"


def runs_of(states: list[str], first: int, page: int) -> list[tuple[int, int, str]]:
    runs: list[tuple[int, int, str]] = []
    for number, state in enumerate(states, first):
        if runs and runs[-1][2] == state:
            runs[-1] = (runs[-1][0], runs[-1][1] + page, state)
        else:
            runs.append((number * page, page, state))
    return runs


@contextlib.contextmanager
def running(machine: type[PageStates]) -> Iterator[None]:
    machine.engine = Engine()
    try:
        yield
    finally:
        machine.engine.close()
        del machine.engine
        gc.collect()


def explore(kind: str, examples: int, **attributes: Any) -> None:
    machine = type(f"PageStates_{kind}", (PageStates,), {"kind": kind, **attributes})
    with running(machine):
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=30,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )


@pytest.mark.parametrize("kind", ["anonymous", "memfd"])
def test_small_pages(kind: str) -> None:
    explore(kind, 120)


@pytest.mark.hugetlb
@pytest.mark.parametrize("kind", ["hugetlb", "hugetlb-memfd"])
def test_huge_pages(kind: str) -> None:
    with huge_pages(4):
        explore(kind, 12, page=HUGE, pages=3, block_pages=[1, 2])


def test_more_runs_than_fit_in_one_call() -> None:
    with contextlib.closing(Engine()) as engine:
        count = 2500
        region = engine.pager.map(count * PAGE_SIZE)
        for page in range(0, count, 2):
            region.install(page * PAGE_SIZE, b"x" * PAGE_SIZE)
        states = [RESIDENT, MISSING] * (count // 2)
        assert region.runs() == runs_of(states, 0, PAGE_SIZE)
        assert region.runs(PAGE_SIZE, 5 * PAGE_SIZE) == runs_of(states[1:6], 1, PAGE_SIZE)
        del region
        gc.collect()


def test_a_closed_region() -> None:
    with contextlib.closing(Engine()) as engine:
        region = engine.pager.map(4 * PAGE_SIZE)
        region.install(0, b"x" * PAGE_SIZE)
        region.close()
        region.close()
        refuse(region)
        del region
        gc.collect()


def refuse(region: aiouffd.Region) -> None:
    for call in (
        lambda: region.install(0, bytes(PAGE_SIZE)),
        lambda: region.zero(0, PAGE_SIZE),
        lambda: region.poison(0, PAGE_SIZE),
        lambda: region.drop(0, PAGE_SIZE),
        lambda: region.runs(),
        lambda: region.is_resident(0, 1),
        lambda: region.begin(0, 1),
        lambda: region.view,
    ):
        with pytest.raises(ClosedError):
            call()
