"""Two tensors out of a file of weights, without downloading the file: the demo.

    python examples/lazy_weights.py

A server on loopback, in a process of its own, has a safetensors file of 1 GiB. This program
opens it lazily, reads its header, and computes over two of its tensors and a few rows of a
third with NumPy, as if the file were in memory. Only what NumPy touches is fetched, when it is
touched. Then it does the same the usual way, by downloading everything first. At the end a map
shows which parts of the file came, and when.

Needs NumPy and aiohttp (`pip install numpy aiohttp`); is nicer with rich, faster with uvloop.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import math
import os
import struct
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from range_server import served

import aiouffd
from aiouffd.safetensors import TensorInfo
from aiouffd.sources import HttpSource

try:
    import aiohttp  # noqa: F401  (the HTTP source needs it)
    import numpy as np
except ImportError as error:
    print(f"skipped: this needs {error.name}; pip install numpy aiohttp")
    sys.exit(0)
try:
    import uvloop
except ImportError:
    uvloop = None
try:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text
except ImportError:
    Console = None

MIB = 1 << 20
LAYERS = 14
PARTS = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
EMBEDDING = "embedding"  # an eighth of the file; the tensors of the layers are a 64th each
ROW = 4096  # numbers in a row of the embedding
WANTED = ("layers.04.attention.qkv", "layers.10.mlp.down")
HEADER = 8192  # bytes before the data; the last tensor is so much shorter

# ------------------------------------------------------------------ the file


def names() -> list[str]:
    """The tensors in the order of the file."""
    return [EMBEDDING, *(f"layers.{i:02}.{part}" for i in range(LAYERS) for part in PARTS)]


def scrambled(count: int, seed: int) -> np.ndarray:
    """The numbers 0, 1/count, 2/count, ... in a scrambled order; count is a power of two.

    Any order has the same mean and norm, which a formula gives: see `expected`.
    """
    factor = np.uint32(2654435761 + 2 * seed)  # odd, so no number comes twice
    order = (np.arange(count, dtype=np.uint32) * factor) % np.uint32(count)
    return (order / np.float32(count)).astype("<f4")


def expected(count: int) -> tuple[float, float]:
    """Mean and Euclidean norm of `scrambled` numbers."""
    return (count - 1) / (2 * count), math.sqrt((count - 1) * (2 * count - 1) / (6 * count))


def wanted_rows(rows: int) -> list[int]:
    """Rows of the embedding that a sentence of eight words might need."""
    return [rows * k // 64 for k in (3, 8, 13, 21, 34, 40, 47, 59)]


def write_weights(path: Path, size: int) -> int:
    """A safetensors file of about `size` bytes, sparse: zeros but for what will be asked for.

    Returns its size in bytes.
    """
    count = 1 << ((size // 64 // 4).bit_length() - 1)  # numbers in the tensor of a layer
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "made_by": "aiouffd demo"}}
    end = 0
    for name in names():
        shape = [count * 8 // ROW, ROW] if name == EMBEDDING else [count]
        if name == names()[-1]:
            shape = [count - HEADER // 4]
        start, end = end, end + math.prod(shape) * 4
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text = text.ljust(HEADER - 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        base = file.tell()
        file.truncate(base + end)
        for seed, name in enumerate(WANTED):
            file.seek(base + header[name]["data_offsets"][0])
            file.write(scrambled(count, seed).tobytes())
        rows = header[EMBEDDING]["shape"][0]
        for row in wanted_rows(rows):
            file.seek(base + row * ROW * 4)
            file.write(np.full(ROW, row, "<f4").tobytes())
    return base + end


# --------------------------------------------------------------- the program


def compute(
    memory: memoryview, tensors: Mapping[str, TensorInfo]
) -> list[tuple[str, float, float]]:
    """(what, mean, norm) of the wanted tensors, then of the wanted rows. Plain NumPy."""
    results = []
    for name in WANTED:
        data = tensors[name].array(memory).astype("f8")
        results.append((name, float(data.mean()), float(np.sqrt(data @ data))))
    table = tensors[EMBEDDING]
    rows = table.array(memory)[wanted_rows(table.shape[0])].astype("f8")
    results.append((f"8 rows of {EMBEDDING}", float(rows.mean()), float(np.linalg.norm(rows))))
    return results


def check(results: list[tuple[str, float, float]], tensors: Mapping[str, TensorInfo]) -> None:
    """Compare with the values that the formulas give."""
    known = [expected(math.prod(tensors[name].shape)) for name in WANTED]
    rows = wanted_rows(tensors[EMBEDDING].shape[0])
    known.append((sum(rows) / len(rows), math.sqrt(ROW * sum(row * row for row in rows))))
    for (name, *found), wanted in zip(results, known, strict=True):
        if not all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(found, wanted, strict=True)):
            raise SystemExit(f"WRONG: {name} gave {found}, it should be {wanted}")


@dataclass
class Run:
    """What one way of doing it cost."""

    first_byte: float = 0.0  # seconds from the start until a byte of the file could be used
    total: float = 0.0
    fetched: int = 0
    size: int = 0
    results: list[tuple[str, float, float]] = field(default_factory=list)
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    flights: list[aiouffd.FlightEvent] = field(default_factory=list)
    started: float = 0.0
    block_size: int = 1
    faults: int = 0


async def lazily(url: str, view: View) -> Run:
    """Open the file as memory, and use it."""
    run = Run(started=time.monotonic())
    async with aiouffd.open(url, trace=run.flights.append) as buffer:
        run.size, run.block_size = len(buffer), buffer.block_size
        with view.progress(run, buffer):
            run.tensors = (await aiouffd.safetensors.load(buffer)).info
            run.first_byte = time.monotonic() - run.started
            # In a worker thread, which waits for the bytes while this loop fetches them.
            run.results = await asyncio.to_thread(compute, buffer.view, run.tensors)
            run.total = time.monotonic() - run.started
        run.fetched, run.faults = buffer.stats.fetched_bytes, buffer.stats.faulted_blocks
    return run


async def eagerly(url: str) -> Run:
    """Download the file with the same client, and use it."""
    run = Run(started=time.monotonic())
    source = HttpSource(url)
    await source.open()
    try:
        run.size = run.fetched = source.size
        memory = memoryview(np.empty(source.size, "u1"))
        await source.read_into(0, memory)
    finally:
        await source.aclose()
    run.tensors = aiouffd.safetensors.parse_header(memory).tensors
    run.first_byte = time.monotonic() - run.started
    run.results = await asyncio.to_thread(compute, memory, run.tensors)
    run.total = time.monotonic() - run.started
    return run


# ------------------------------------------------------------------ the view

EIGHTHS = " ▁▂▃▄▅▆▇█"
# From the first fetch to the last: violet, blue, green, yellow.
COLOURS = ((118, 60, 190), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def colour(when: float) -> str:
    """For a time from 0 (start) to 1 (end)."""
    place = min(max(when, 0.0), 1.0) * (len(COLOURS) - 1)
    index = min(int(place), len(COLOURS) - 2)
    rest = place - index
    pairs = zip(COLOURS[index], COLOURS[index + 1], strict=True)
    red, green, blue = (round(a + (b - a) * rest) for a, b in pairs)
    return f"rgb({red},{green},{blue})"


@dataclass
class Cell:
    """One character of the map: how much of its part of the file came, and when the first did."""

    share: float = 0.0
    when: float = 0.0


def cells(run: Run, count: int, until: float) -> list[Cell]:
    """The file in `count` equal parts; `until` is the time that counts as 1."""
    step = math.ceil(run.size / count)
    found = [Cell() for _ in range(count)]
    for flight in list(run.flights):
        when = (flight.finished - run.started) / until
        end = min(flight.offset + flight.length, run.size)
        for index in range(flight.offset // step, (end - 1) // step + 1):
            overlap = min(end, (index + 1) * step) - max(flight.offset, index * step)
            cell = found[index]
            if not cell.share or when < cell.when:
                cell.when = when
            cell.share += overlap / step
    return found


def size_of(count: int) -> str:
    """1610612736 -> '1.50 GiB'."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{count} B" if unit == "B" else f"{value:.3g} {unit}"


def time_of(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


class View:
    """What the user sees: plain lines, or with colours and movement through rich."""

    def __init__(self, plain: bool) -> None:
        self.console = None
        if not plain and Console is not None:
            self.console = Console(highlight=False)
        # Fewer colours than these cannot tell the time.
        self.colours = self.console is not None and self.console.color_system in (
            "256",
            "truecolor",
        )
        width = 80 if self.console is None else self.console.width
        self.columns = 64 if width >= 100 else 32
        self.rows = 16

    def say(self, text: str = "", style: str | None = None) -> None:
        if self.console is None:
            print(text, flush=True)
        else:
            self.console.print(text, style=style, markup=False, soft_wrap=True)

    @contextmanager
    def progress(self, run: Run, buffer: aiouffd.LazyBuffer) -> Iterator[None]:
        """Show the map filling up while the body runs; nothing that moves in plain mode."""
        if self.console is None or not self.console.is_terminal:
            yield
            return

        def frame() -> Any:
            now = time.monotonic() - run.started
            stats = buffer.stats
            line = (
                f"{time_of(now):>9}   {size_of(stats.fetched_bytes):>8} of"
                f" {size_of(stats.size)}   {stats.faulted_blocks} blocks waited for,"
                f" {stats.in_flight} requests under way"
            )
            return Group(Text(line, style="bold"), self.map(run, max(now, 1e-3)))

        # rich draws on a thread of its own, so the event loop is not disturbed.
        with Live(
            console=self.console, get_renderable=frame, refresh_per_second=15, transient=True
        ):
            yield

    def map(self, run: Run, until: float) -> Any:
        """The file as a rectangle of characters, coloured by the time when a part came."""
        grid = cells(run, self.columns * self.rows, until)
        step = math.ceil(run.size / (self.columns * self.rows))
        lines = []
        for row in range(self.rows):
            at = row * self.columns * step
            part = grid[row * self.columns : (row + 1) * self.columns]
            lines.append((f"{size_of(at):>9} ", part, self._note(run, at, self.columns * step)))
        if not self.colours:
            return "\n".join(
                label + "".join(map(self._plain_cell, part)) + note for label, part, note in lines
            )
        text = Text(no_wrap=True)
        for index, (label, part, note) in enumerate(lines):
            text.append(("\n" if index else "") + label, style="dim")
            for cell in part:
                if cell.share:
                    text.append(self._bar(cell), style=f"{colour(cell.when)} on grey11")
                else:
                    text.append("·", style="grey30 on grey11")
            text.append(note, style="bold")
        return text

    @staticmethod
    def _bar(cell: Cell) -> str:
        return EIGHTHS[min(8, max(1, math.ceil(cell.share * 8 - 0.01)))]

    @staticmethod
    def _plain_cell(cell: Cell) -> str:
        return str(min(9, int(cell.when * 10))) if cell.share else "."

    @staticmethod
    def _note(run: Run, at: int, length: int) -> str:
        """Which of the wanted tensors begin in this row of the map."""
        here = [
            name
            for name in (EMBEDDING, *WANTED)
            if name in run.tensors and at <= run.tensors[name].offset < at + length
        ]
        return "  " + ", ".join(here) if here else ""

    def fault_map(self, run: Run) -> None:
        """The finished map with its legend."""
        step = math.ceil(run.size / (self.columns * self.rows))
        self.say(f"What was fetched, and when (each character is {size_of(step)}):", "bold")
        if not self.colours or self.console is None:
            self.say(self.map(run, run.total))
            self.say(f"          . never   0 at the start ... 9 at the end, {time_of(run.total)}")
            return
        self.console.print(self.map(run, run.total))
        legend = Text("          ")
        legend.append("·", style="grey30 on grey11")
        legend.append(" never    height: how much of it    colour: 0 ")
        for index in range(24):
            legend.append("█", style=colour(index / 23))
        legend.append(f" {time_of(run.total)}")
        self.console.print(legend)

    def results(self, run: Run) -> None:
        if self.console is None:
            for name, mean, norm in run.results:
                self.say(f"  {name:<28} mean {mean:<12.7g} norm {norm:<12.7g} as expected")
            return
        table = Table("", "mean", "norm", "", box=None, pad_edge=False, header_style="dim")
        for name, mean, norm in run.results:
            table.add_row(name, f"{mean:.7g}", f"{norm:.7g}", "[green]✓ as expected[/]")
        self.console.print(table)

    def comparison(self, lazy: Run, eager: Run | None) -> None:
        rows = [("", "lazily", "by download"), *self._figures(lazy, eager)]
        if self.console is None:
            for label, left, right in rows:
                self.say(f"  {label:<20} {left:>22}   {right if eager else '':>16}".rstrip())
            return
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("")
        table.add_column("lazily", justify="right", style="bold green")
        if eager:
            table.add_column("by download", justify="right")
        for row in rows[1:]:
            table.add_row(*row[: 3 if eager else 2])
        self.console.print(table)

    @staticmethod
    def _figures(lazy: Run, eager: Run | None) -> list[tuple[str, str, str]]:
        other = eager or Run()
        return [
            ("time to first byte", time_of(lazy.first_byte), time_of(other.first_byte)),
            ("time total", time_of(lazy.total), time_of(other.total)),
            (
                "bytes fetched",
                f"{size_of(lazy.fetched)} ({lazy.fetched / lazy.size:.1%})",
                size_of(other.fetched),
            ),
        ]


def draw(run: Run, path: Path) -> str:
    """The map as a picture: place in the file against time. What to tell the user."""
    try:
        import matplotlib
    except ImportError:
        return f"no {path}: matplotlib is not installed"
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for cause, paint in (("readahead", "tab:blue"), ("fetch", "tab:green"), ("fault", "tab:red")):
        flights = [flight for flight in run.flights if flight.cause == cause]
        axes.bar(
            [(flight.started - run.started) * 1000 for flight in flights],
            [flight.length / MIB for flight in flights],
            [(flight.finished - flight.started) * 1000 for flight in flights],
            [flight.offset / MIB for flight in flights],
            align="edge",
            color=paint,
            edgecolor=paint,
            label=f"{cause} ({len(flights)})",
        )
    axes.set(xlabel="ms", ylabel="MiB from the start of the file", ylim=(0, run.size / MIB))
    axes.set_title(f"{size_of(run.fetched)} of {size_of(run.size)} fetched")
    axes.legend()
    figure.savefig(path, dpi=120)
    return f"wrote {path}"


# -------------------------------------------------------------------- main


async def demo(arguments: argparse.Namespace, view: View) -> None:
    # In memory if possible: what the server's disk takes is not what is compared here.
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="aiouffd-demo-", dir=shared) as folder:
        path = Path(folder, "weights.safetensors")
        size = write_weights(path, arguments.size * MIB)
        async with served(path, arguments.latency) as url:
            view.say(f"{url}: {size_of(size)}, {len(names())} tensors", "bold")
            if arguments.latency:
                view.say(f"each reply of the server is delayed by {arguments.latency:g} ms")
            view.say()
            lazy = await lazily(url, view)
            check(lazy.results, lazy.tensors)
            view.results(lazy)
            view.say()
            eager = None
            if not arguments.no_eager:
                if view.console is not None and view.console.is_terminal:
                    with view.console.status("The same by downloading the file first ..."):
                        eager = await eagerly(url)
                else:
                    eager = await eagerly(url)
                check(eager.results, eager.tensors)
    view.comparison(lazy, eager)
    view.say()
    view.fault_map(lazy)
    causes = [flight.cause for flight in lazy.flights]
    view.say(
        f"          {len(causes)} requests: {causes.count('fault')} because a thread waited,"
        f" {causes.count('readahead')} ahead of it, {causes.count('fetch')} asked for by await",
        "dim",
    )
    if arguments.png:
        view.say()
        view.say(draw(lazy, arguments.png))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Use two tensors of a 1 GiB file on an HTTP server without downloading it."
    )
    parser.add_argument("--size", type=int, default=1024, metavar="MIB", help="default: 1024")
    parser.add_argument("--latency", type=float, default=0, metavar="MS", help="of each reply")
    parser.add_argument("--no-eager", action="store_true", help="skip the download to compare with")
    parser.add_argument("--plain", action="store_true", help="no colours, nothing that moves")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the map (needs matplotlib)")
    arguments = parser.parse_args()
    if arguments.size < 8:
        parser.error("--size is at least 8 MiB")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # terminals without Unicode
    view = View(arguments.plain or os.environ.get("TERM") == "dumb")
    run = asyncio.run if uvloop is None else uvloop.run
    run(demo(arguments, view))


if __name__ == "__main__":
    main()
