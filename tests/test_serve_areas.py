"""The map of another process's memory, against a model with one entry per page."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from aiouffd.foreign.areas import REMOVED, Area, AreaMap

PAGE = 4096
SPACE = 64  # pages of addresses

pages = st.integers(0, SPACE - 1)
counts = st.integers(1, 24)


class Store:
    """Stands for a `BlockStore`, of which the map knows the block size only."""

    block_size = 4 * PAGE


class Model(RuleBasedStateMachine):
    """What each page of the address space is: its object, the page in it, removed or not."""

    def __init__(self) -> None:
        super().__init__()
        self.map = AreaMap()
        self.model: dict[int, tuple[Any, int, bool]] = {}
        self.copies: list[tuple[AreaMap, dict[int, tuple[Any, int, bool]]]] = []

    @initialize(layout=st.lists(st.tuples(pages, counts, st.integers(0, 200)), max_size=6))
    def lay_out(self, layout: list[tuple[int, int, int]]) -> None:
        for start, count, offset in layout:
            self.add(start, count, offset)

    @rule(start=pages, count=counts, offset=st.integers(0, 200))
    def add(self, start: int, count: int, offset: int) -> None:
        store: Any = Store()
        area = Area(start * PAGE, count * PAGE, store, offset * PAGE)
        taken = any(page in self.model for page in range(start, start + count))
        try:
            self.map.add(area)
        except ValueError:
            assert taken
            return
        assert not taken
        for index in range(count):
            self.model[start + index] = (store, offset + index, False)

    @rule(start=pages, count=counts)
    def remove(self, start: int, count: int) -> None:
        self.map.removed(start * PAGE, (start + count) * PAGE)
        for page in range(start, start + count):
            if page in self.model:
                store, offset, _ = self.model[page]
                self.model[page] = (store, offset, True)

    @rule(start=pages, count=counts)
    def unmap(self, start: int, count: int) -> None:
        self.map.unmapped(start * PAGE, (start + count) * PAGE)
        for page in range(start, start + count):
            self.model.pop(page, None)

    @rule(start=pages, count=counts, to=pages)
    def move(self, start: int, count: int, to: int) -> None:
        if to < start + count and start < to + count:
            return  # mremap refuses to overlap
        self.map.moved(start * PAGE, to * PAGE, count * PAGE)
        moved = {page: self.model.pop(page, None) for page in range(start, start + count)}
        for page in range(to, to + count):
            self.model.pop(page, None)
        for page, what in moved.items():
            if what is not None:
                self.model[to + page - start] = what

    @rule()
    def fork(self) -> None:
        self.copies.append((self.map.copy(), dict(self.model)))
        self.copies = self.copies[-3:]

    @rule(start=pages, count=counts)
    def install(self, start: int, count: int) -> None:
        for area, low, high in self.map.within(start * PAGE, (start + count) * PAGE):
            area.mark_installed(low, high)

    @invariant()
    def same(self) -> None:
        agree(self.map, self.model)

    @invariant()
    def forked_children_keep_what_they_had(self) -> None:
        for copy, model in self.copies:
            agree(copy, model)


def agree(found: AreaMap, model: dict[int, tuple[Any, int, bool]]) -> None:
    for page in range(2 * SPACE):
        area = found.find(page * PAGE + 17)
        if page not in model:
            assert area is None
            continue
        store, offset, removed = model[page]
        assert area is not None
        assert area.store is store
        assert area.offset_of(page * PAGE) == offset * PAGE
        assert bool(area.state_of(page * PAGE) & REMOVED) == removed
        block = offset * PAGE // store.block_size
        places = [(low, high) for of, low, high in found.of_block(store, block) if of is area]
        assert any(low <= page * PAGE < high for low, high in places)
    spans = [(area.start, area.end) for area in found]
    assert spans == sorted(spans)
    assert found.bytes == len(model) * PAGE


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=150, stateful_step_count=20, deadline=None)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_missing_runs(data: st.DataObject) -> None:
    """Runs of what is missing are exactly the pages with no state, in order and apart."""
    states = bytearray(
        data.draw(st.binary(min_size=1, max_size=40)).translate(
            bytes(value % 4 for value in range(256))
        )
    )
    store: Any = Store()
    area = Area(10 * PAGE, len(states) * PAGE, store, 0, PAGE, memoryview(states))
    first = data.draw(st.integers(0, len(states) - 1))
    last = data.draw(st.integers(first, len(states)))
    runs = list(area.missing(area.start + first * PAGE, area.start + last * PAGE))
    found = [page for low, high in runs for page in range(low // PAGE - 10, high // PAGE - 10)]
    assert found == [page for page in range(first, last) if not states[page]]
    assert all(low < high for low, high in runs)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(runs))
