"""Readahead by a model in virtual time: the figures are the same on any machine."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aiouffd
from aiouffd import ClosedError, UsageError
from aiouffd.fetch.advice import HINTS, Advice
from aiouffd.fetch.readahead import Readahead
from benchmarks.readahead_model import Figures, Link, columns, play, workloads

from .faulty import PlainSource
from .support import wait_until

PIECE, WINDOW, BLOCK = 32, 128, 64 * 1024
LINKS = {
    "1 ms": Link(1e-3, 1.25e9),
    "5 ms": Link(5e-3, 1.25e9),
    "30 ms": Link(30e-3, 1.25e9),
    "5 ms at 1 Gbit/s": Link(5e-3, 1.25e8, as_they_come=True),
}
WORKLOADS = workloads()


def in_thread(work: Callable[[], object]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def played(threads: Any, blocks: int, link: str = "5 ms", advice: Advice | None = None) -> Figures:
    def planner(there: Callable[[int], bool]) -> Readahead:
        return Readahead(blocks, WINDOW, PIECE, advice, there)

    return play(planner, threads, blocks, LINKS[link])


@pytest.mark.parametrize("link", LINKS)
class TestColumns:
    @pytest.mark.parametrize("groups", [1, 2, 4, 10, 32])
    @pytest.mark.parametrize("vary", [0.0, 0.1])
    def test_32_mib_cost_at_most_1_3_of_that(self, link: str, groups: int, vary: float) -> None:
        length = 512 // groups
        figures = played(columns(length, groups, 10, vary=vary), length * groups * 11, link)
        assert figures.amplification <= 1.3

    @pytest.mark.parametrize("groups", [4, 10, 32])
    def test_two_at_a_time(self, link: str, groups: int) -> None:
        length = 256 // groups
        figures = played(columns(length, groups, 10, (2, 7)), length * groups * 11, link)
        assert figures.amplification <= 1.32

    @pytest.mark.parametrize(
        "name",
        ["2 of 5 in 32 chunks of 1 MiB, in turn", "3 of 10 in 32 chunks of 1 MiB, in turn"],
    )
    def test_where_the_lead_over_one_ends_another_begins(self, link: str, name: str) -> None:
        """All of the table was fetched, for it looked like a scan."""
        assert played(*WORKLOADS[name], link).amplification <= 1.2

    @pytest.mark.parametrize("length", [16, 128])
    def test_one_that_is_short(self, link: str, length: int) -> None:
        """Nothing is known of it before it ends."""
        assert played(columns(length, 1, 10), length * 11, link).amplification <= 2.1

    def test_of_two_lengths(self, link: str) -> None:
        """Those may be taken for one another at first. (It was 5 to 9 times.)"""
        name = "chunks of 13 and 51 blocks in turn"
        assert played(*WORKLOADS[name], link).amplification <= 1.75


class TestScans:
    """Of a source 30 ms away, in the seconds that they took when every run doubled its window with
    each touch, without regard to its length."""

    @pytest.mark.parametrize(
        ("size", "seconds"), [(32, 0.219), (64, 0.311), (256, 0.818), (1024, 2.845)]
    )
    def test_of_a_whole_object(self, size: int, seconds: float) -> None:
        figures = played(*WORKLOADS[f"scan of {size} MiB"], "30 ms")
        assert figures.seconds <= seconds
        assert figures.amplification == 1

    def test_backwards(self) -> None:
        figures = played(*WORKLOADS["scan backwards"], "30 ms")
        forwards = played(*WORKLOADS["scan in the midst"], "30 ms")
        assert figures.flights <= 1.2 * forwards.flights
        assert figures.seconds <= 1.1 * forwards.seconds

    def test_after_columns(self) -> None:
        """It is found out that this one is longer."""
        figures = played(*WORKLOADS["a scan after columns"])
        assert figures.flights <= 130

    def test_by_reads(self) -> None:
        for each in (4, 16, 128):
            figures = played(*WORKLOADS[f"a scan by reads of {each} blocks"])
            assert figures.flights <= 80
            assert figures.waits <= 70


@pytest.mark.parametrize(
    "name",
    [
        "random",
        "random, small object",
        "random, 4 threads",
        "zipf",
    ],
)
def test_random_touches_cost_themselves(name: str) -> None:
    assert played(*WORKLOADS[name]).amplification <= 1.01


def test_random_touches_after_columns() -> None:
    """What the columns have cost is all."""
    alone = played(columns(51, 4, 10), 16384)
    figures = played(*WORKLOADS["random touches after columns"])
    extra = figures.fetched - figures.needed - (alone.fetched - alone.needed)
    assert extra <= 20 * BLOCK


class TestDecisions:
    def test_the_first_block_promises_more_than_others(self) -> None:
        whole, other, late = (Readahead(100_000, WINDOW, PIECE) for _ in range(3))
        assert [*whole.touch(0), *whole.touch(1)] == [(2, 8)]
        assert [*other.touch(64), *other.touch(65)] == [(66, 4)]
        late.touch(5000)  # a table's footer, say
        assert [*late.touch(0), *late.touch(1)] == [(2, 4)]

    def test_the_end_of_a_run_is_that_of_the_next(self) -> None:
        plans = Readahead(100_000, WINDOW, PIECE)
        for block in itertools.chain(range(64, 94), [94, 96, 100]):
            plans.touch(block)
        plans.touch(5000)
        plans.touch(5001)
        [(first, count)] = plans.touch(5018)
        least, slack = 100 - 64 + 1, 3
        assert first + count <= 5000 + least + slack
        assert first + count >= 5000 + least

    def test_a_run_that_begins_where_it_is_expected(self) -> None:
        plans = Readahead(100_000, WINDOW, PIECE)
        for start in (64, 1064, 2065):
            for block in (0, 1, 2, 3, 4, 10, 36):
                plans.touch(start + block)
        assert plans.touch(5000) == []
        [(first, count)] = plans.touch(3065)  # sizes in blocks differ by one
        assert first == 3066
        assert 8 <= count <= 40

    @pytest.mark.parametrize("arrived", [False, True])
    def test_who_has_not_read_what_was_asked_for_has_not_come_by_it(self, arrived: bool) -> None:
        plans = Readahead(100_000, WINDOW, PIECE, None, lambda block: arrived)
        ends = [sum(runs[-1]) for runs in map(plans.touch, range(1000, 1016)) if runs]
        runs = plans.touch(ends[-1])  # nothing of it was asked for yet
        assert bool(runs) == arrived

    def test_one_that_goes_on_has_not_ended(self) -> None:
        """Of several at a time, which do not wait for each other."""
        plans = Readahead(100_000, WINDOW, PIECE)
        for block in range(64, 75):
            plans.touch(block)
        plans.touch(5000)
        plans.touch(75)
        plans.touch(5001)
        for block in range(5002, 5100):
            plans.touch(block)
        assert plans._lengths(plans._streams[-1]) == []

    def test_the_lead_of_a_run_is_bounded_by_what_it_has_read(self) -> None:
        for length in (16, 50, 200, 600, 2000):
            plans = Readahead(100_000, WINDOW, PIECE)
            end = 0
            for block in range(1000, 1000 + length):
                for first, count in plans.touch(block):
                    end = max(end, first + count)
                    plans.landed(first, count)
            lead = end - 1000 - length
            assert lead <= min(max(16, length, PIECE), max(WINDOW + PIECE, length * 2 // 7 + PIECE))

    @pytest.mark.parametrize("blocks", [1000, 1024])
    def test_backwards_mirrors_forwards(self, blocks: int) -> None:
        plans = Readahead(blocks, WINDOW, PIECE)
        there: set[int] = set()
        for block in range(blocks - 1, -1, -1):
            if block in there:
                continue
            there.add(block)
            for first, count in plans.touch(block):
                assert count >= 1
                assert first >= 0
                assert first + count <= block
                there.update(range(first, first + count))
        assert len(there) == blocks

    def test_backwards_brings_what_is_near_first(self) -> None:
        plans = Readahead(10_000, WINDOW, PIECE)
        for block in range(5000, 4500, -1):
            firsts = [first for first, _ in plans.touch(block)]
            assert firsts == sorted(firsts, reverse=True)


class TestAdvice:
    def test_what_is_said_last_counts(self) -> None:
        advice = Advice()
        advice.say("random", 10, 100)
        advice.say("sequential", 40, 60)
        advice.say("normal", 90, 200)
        assert [advice.at(n)[0] for n in (9, 10, 39, 40, 59, 60, 89, 90)] == [
            "normal",
            *["random"] * 2,
            *["sequential"] * 2,
            *["random"] * 2,
            "normal",
        ]
        assert advice.at(45) == ("sequential", 60)
        assert advice.without_random([(0, 20), (35, 30), (95, 5)]) == [(0, 10), (40, 20), (95, 5)]
        advice.say("normal", 0, 1000)
        assert advice.at(45) == ("normal", 46)

    @pytest.mark.parametrize("seed", range(3))
    def test_as_a_list_of_hints(self, seed: int) -> None:
        chance, advice = random.Random(seed), Advice()
        expected = ["normal"] * 50
        for _ in range(60):
            first, hint = chance.randrange(50), chance.choice(HINTS)
            end = chance.randrange(first, 51)
            advice.say(hint, first, end)
            expected[first:end] = [hint] * (end - first)
            assert [advice.at(block)[0] for block in range(50)] == expected
            left = {
                b for first, n in advice.without_random([(0, 50)]) for b in range(first, first + n)
            }
            assert left == {block for block in range(50) if expected[block] != "random"}

    def test_sequential_begins_at_once_and_ends_with_its_range(self) -> None:
        advice = Advice()
        plans = Readahead(100_000, WINDOW, PIECE, advice)
        for block in range(20):
            plans.touch(block * block * 97 + 50_000)  # which makes it doubt
        advice.say("sequential", 1000, 1400)
        there: set[int] = set()
        for block in range(1000, 1400):
            if block not in there:
                there.add(block)
                for first, count in plans.touch(block):
                    there.update(range(first, first + count))
                if block == 1000:
                    assert WINDOW <= len(there) <= WINDOW + 2 * PIECE
        assert there == set(range(1000, 1400))

    def test_sequential_columns_cost_themselves(self) -> None:
        advice = Advice()
        [touches] = columns(128, 4, 10)
        for first, _ in itertools.groupby(touches, lambda block: block // 1280):
            start = next(b for b in touches if b // 1280 == first)
            advice.say("sequential", start, start + 128)
        figures = played([touches], 6000, "30 ms", advice)
        assert figures.amplification == 1
        assert figures.seconds <= 0.7 * played([touches], 6000, "30 ms").seconds

    def test_random_brings_nothing(self) -> None:
        advice = Advice()
        advice.say("random", 0, 500)
        plans = Readahead(1000, WINDOW, PIECE, advice)
        assert not any(plans.touch(block) for block in range(100))
        assert not any(plans.read(block, block + 3) for block in range(100, 200, 4))
        assert [*plans.touch(600), *plans.touch(601)] == [(602, 4)]

    def test_nothing_is_brought_into_a_random_range(self) -> None:
        advice = Advice()
        advice.say("random", 120, 200)
        plans = Readahead(1000, WINDOW, PIECE, advice)
        asked = {
            block
            for touched in range(1, 120)
            for first, count in plans.touch(touched)
            for block in range(first, first + count)
        }
        assert asked
        assert not asked & set(range(120, 200))

    def test_of_a_buffer(self) -> None:
        source = PlainSource(bytes(64 * BLOCK))
        with aiouffd.sync.open(source) as buf:
            buf.advise("random")
            for block in range(8):
                assert buf[block * BLOCK] == 0
            assert source.bytes_read == 8 * BLOCK
            buf.advise("sequential", 20 * BLOCK + 1, 10 * BLOCK - 1)
            assert buf[20 * BLOCK] == 0
            wait_until(lambda: buf.resident(20 * BLOCK) == [(20 * BLOCK, 30 * BLOCK)], "the range")
            assert source.bytes_read == 18 * BLOCK
            for wrong in ("often", None):
                with pytest.raises(UsageError, match="'random'"):
                    buf.advise(wrong)  # type: ignore[arg-type]
            with pytest.raises(UsageError, match="within"):
                buf.advise("normal", 64 * BLOCK, 1)
        with pytest.raises(ClosedError):
            buf.advise("normal")
        with aiouffd.sync.open(b"") as empty:
            empty.advise("random")


def test_a_buffer_tells_what_has_arrived() -> None:
    with aiouffd.sync.open(PlainSource(bytes(10 * BLOCK + 5))) as buf:
        sink = buf._buffer._sink
        assert sink is not None
        assert sink.fetcher._readahead is not None
        there = sink.fetcher._readahead._there
        assert there is not None
        assert not there(10)
        assert buf[10 * BLOCK] == 0
        assert there(10)
        assert not there(9)


class TestTables:
    """By pyarrow, whose threads read where they like."""

    @pytest.mark.parametrize("groups", [1, 4, 10])
    @pytest.mark.parametrize("kind", ["parquet", "arrow"])
    @pytest.mark.parametrize("names", [["c2"], ["c1", "c3"]])
    def test_columns_cost_little_more_than_themselves(
        self, tmp_path: Path, kind: str, groups: int, names: list[str]
    ) -> None:
        pa = pytest.importorskip("pyarrow")
        pq = pytest.importorskip("pyarrow.parquet")
        rows = 4 << 20
        noise = np.random.default_rng(11).random(rows)
        table = pa.table({f"c{number}": noise for number in range(5)})
        path, each = tmp_path / "table", -(-rows // groups)
        if kind == "parquet":
            pq.write_table(
                table, path, compression="none", use_dictionary=False, row_group_size=each
            )
        else:
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=each)
        source = PlainSource(path.read_bytes())

        def read() -> None:
            memory = pa.BufferReader(pa.py_buffer(buf.view))
            if kind == "parquet":
                pq.ParquetFile(memory).read(columns=names)
                return
            file = pa.ipc.open_file(memory)
            for number in range(file.num_record_batches):
                for name in names:
                    file.get_batch(number).column(name).to_numpy().sum()

        with aiouffd.sync.open(source) as buf:
            in_thread(read)
        # With nothing known it is up to 1.25, and threads meet each other on the way.
        assert source.bytes_read <= 1.35 * noise.nbytes * len(names)

    def test_a_file_fetches_what_is_read(self, tmp_path: Path) -> None:
        pa = pytest.importorskip("pyarrow")
        pq = pytest.importorskip("pyarrow.parquet")
        noise = np.random.default_rng(11).random(1 << 20)
        table = pa.table({f"c{number}": noise for number in range(5)})
        pq.write_table(
            table, tmp_path / "t", compression="none", use_dictionary=False, row_group_size=1 << 18
        )
        source = PlainSource((tmp_path / "t").read_bytes())
        with aiouffd.open_file(source) as file:
            in_thread(lambda: pq.ParquetFile(file).read(columns=["c1", "c3"]))
        assert source.bytes_read <= 1.1 * 2 * noise.nbytes
