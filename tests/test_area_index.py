"""Which areas show a block of an object: an index against a look at all of them."""

from __future__ import annotations

import time
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from aiouffd.serve import Area, AreaMap

PAGE = 4096


class Store:
    """All that an area map wants to know of an object."""

    block_size = 4 * PAGE


STORES: list[Any] = [Store(), Store(), None]

areas = st.tuples(
    st.integers(0, 60), st.integers(1, 12), st.integers(0, 40), st.sampled_from(STORES)
)
changes = st.tuples(st.sampled_from(["unmap", "move"]), st.integers(0, 60), st.integers(1, 20))


def by_looking(found: AreaMap, store: Any, number: int) -> list[tuple[int, int, int]]:
    low, high = number * Store.block_size, (number + 1) * Store.block_size
    shown = []
    for area in found:
        first, last = max(low, area.offset), min(high, area.offset + area.length)
        if area.store is store and first < last:
            start = area.start + first - area.offset
            shown.append((area.start, start, start + last - first))
    return sorted(shown)


@given(made=st.lists(areas, max_size=12), changed=st.lists(changes, max_size=4))
@settings(max_examples=300, deadline=None)
def test_areas_of_a_block(
    made: list[tuple[int, int, int, Any]], changed: list[tuple[str, int, int]]
) -> None:
    found = AreaMap()
    for start, length, offset, store in made:
        try:
            found.add(Area(start * PAGE, length * PAGE, store, offset * PAGE))
        except ValueError:
            continue  # it overlaps another one
    for change in [("look", 0, 0), *changed]:
        kind, page, count = change
        if kind == "unmap":
            found.unmapped(page * PAGE, (page + count) * PAGE)
        elif kind == "move":
            found.moved(page * PAGE, (200 + page) * PAGE, count * PAGE)
        for store in STORES[:2]:
            for number in range(14):
                shown = found.of_block(store, number)
                assert [area.offset for area, _, _ in shown] == sorted(
                    area.offset for area, _, _ in shown
                )
                assert sorted((area.start, low, high) for area, low, high in shown) == by_looking(
                    found, store, number
                )


def test_many_areas_are_no_matter() -> None:
    """A look at each of so many for each block would take minutes."""
    count = 30_000
    found = AreaMap(Area(2 * at * PAGE, PAGE, STORES[0], at * PAGE) for at in range(count))
    began = time.process_time()
    shown = sum(len(found.of_block(STORES[0], number)) for number in range(count // 4))
    assert shown == count
    assert time.process_time() - began < 5
