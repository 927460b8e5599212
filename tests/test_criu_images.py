"""CRIU's images are read, whatever version wrote them, wherever they are, and however broken."""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiouffd.errors import SourceError, UsageError
from aiouffd.serve.criu import ImageError, ImageSet, TaskImage, load
from aiouffd.serve.criu.format import (
    Entry,
    Vma,
    parse_inventory,
    parse_pagemap,
    parse_pstree,
    parse_vmas,
)
from aiouffd.serve.criu.plan import ELSEWHERE, Piece
from aiouffd.sources import as_source
from aiouffd.sources.base import aclose_source, open_source
from tests.criu import images as written
from tests.criu.images import LAZY, PAGE, PARENT, PRESENT, Pages, Task, number
from tests.servers.http import RangeServer
from tests.support import environment

BASE = 0x10_0000_0000
BOTH = PRESENT | LAZY


def at(page: int) -> int:
    return BASE + page * PAGE


def one_task(*pages: Pages, vmas: list[tuple[int, int]] | None = None) -> list[Task]:
    return [Task(7, vmas or [(at(0), at(64))], list(pages))]


async def task_of(files: Mapping[str, Any], pid: int = 7, **options: Any) -> TaskImage:
    return (await load(ImageSet(files), **options)).tasks[pid]


async def bytes_of(task: TaskImage) -> dict[int, bytes]:
    """What would be served at each page."""
    found = {}
    for piece in task.pieces or ():
        spec, options = task.files[piece.generation].source()
        source = as_source(spec, **options)
        await open_source(source)
        data = bytes(await source.read(piece.offset, piece.length))
        await aclose_source(source)
        for done in range(0, piece.length, PAGE):
            found[piece.start + done] = data[done : done + PAGE]
    return found


def expected(*pages: Pages) -> dict[int, bytes]:
    return {
        run.address + n * PAGE: written.page_bytes(run.tag, run.address + n * PAGE)
        for run in pages
        for n in range(run.count)
    }


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("entry", [written.entry_42, written.entry_41])
async def test_pages_are_found(entry: Callable[..., bytes], version: int) -> None:
    lazy = [Pages(at(0), 3), Pages(at(5), 2, tag=2), Pages(at(9), 1, tag=3)]
    eager = Pages(at(4), 1, PRESENT, tag=9)
    runs = [lazy[0], eager, *lazy[1:]]
    files = written.dump(one_task(*runs), entry=entry, version=version)
    task = await task_of(files)
    assert await bytes_of(task) == expected(*lazy)
    assert task.bytes == 6 * PAGE
    assert task.elsewhere == ()
    task = await task_of(files, everything=True)
    assert await bytes_of(task) == expected(*runs)


async def test_before_flags_nothing_was_lazy() -> None:
    run = Pages(at(3), 2)
    files = written.dump(one_task(run), entry=written.entry_20)
    assert (await task_of(files)).pieces == ()
    assert await bytes_of(await task_of(files, everything=True)) == expected(run)


async def test_tasks_and_the_dead() -> None:
    tasks = [
        Task(7, [(at(0), at(4))], [Pages(at(0), 4, tag=1)]),
        Task(9, dead=True),
        Task(8, [(at(0), at(4))], [Pages(at(0), 4, tag=2)]),
    ]
    dump = await load(ImageSet(written.dump(tasks)))
    assert list(dump.tasks) == [7, 9, 8]
    assert dump.tasks[9].pieces is None
    for task in (tasks[0], tasks[2]):
        assert await bytes_of(dump.tasks[task.pid]) == expected(*task.pages)


async def test_pieces_end_with_their_mapping() -> None:
    vmas = [(at(0), at(4)), (at(4), at(6)), (at(8), at(12))]
    files = written.dump(one_task(Pages(at(2), 4), Pages(at(8), 1), vmas=vmas))
    assert (await task_of(files)).pieces == (
        Piece(at(2), 2 * PAGE, 0, 0),
        Piece(at(4), 2 * PAGE, 0, 2 * PAGE),
        Piece(at(8), PAGE, 0, 4 * PAGE),
    )


async def test_what_a_dump_has_cut_is_put_together() -> None:
    runs = [Pages(at(page), 2) for page in range(0, 8, 2)]
    files = written.dump(one_task(*runs))
    assert (await task_of(files)).pieces == (Piece(at(0), 8 * PAGE, 0, 0),)
    # ... but not over a page that is elsewhere in the file.
    runs[1].flags = PRESENT
    files = written.dump(one_task(*runs))
    assert (await task_of(files)).pieces == (
        Piece(at(0), 2 * PAGE, 0, 0),
        Piece(at(4), 4 * PAGE, 0, 4 * PAGE),
    )


async def test_guard_pages_are_no_mapping_of_their_own() -> None:
    files = written.dump(one_task(Pages(at(0), 4)))
    guard = written.vma(at(1), at(2), status=1 << 16)
    files["mm-7.img"] = written.mm([written.vma(at(0), at(4)), guard])
    assert (await task_of(files)).pieces == (Piece(at(0), 4 * PAGE, 0, 0),)


async def test_entries_out_of_order() -> None:
    """Their offsets go by the order in the file."""
    runs = [Pages(at(8), 2), Pages(at(0), 1, PRESENT), Pages(at(2), 3)]
    task = await task_of(written.dump(one_task(*runs)))
    assert task.pieces == (Piece(at(2), 3 * PAGE, 0, 3 * PAGE), Piece(at(8), 2 * PAGE, 0, 0))
    assert await bytes_of(task) == expected(runs[0], runs[2])


async def test_pages_that_were_left_to_a_page_server() -> None:
    task = await task_of(
        written.dump(one_task(Pages(at(0), 2), Pages(at(2), 3, LAZY), Pages(at(9), 1)))
    )
    assert task.elsewhere == ((at(2), 3 * PAGE),)
    assert task.pieces == (
        Piece(at(0), 2 * PAGE, 0, 0),
        Piece(at(2), 3 * PAGE, ELSEWHERE, at(2)),
        Piece(at(9), PAGE, 0, 2 * PAGE),
    )


def test_more_pages_than_32_bits_can_count() -> None:
    data = written.pagemap(1, [written.entry_42(at(0), 1 << 32, LAZY)])
    (entry,) = parse_pagemap("p", data).entries
    assert entry == Entry(at(0), at(0) + (1 << 44), LAZY, -1)


def test_an_entry_without_pages_is_nothing() -> None:
    data = written.pagemap(1, [written.entry_41(at(0), 0, BOTH), written.entry_42(at(0), 1, BOTH)])
    assert len(parse_pagemap("p", data).entries) == 1


# ----------------------------------------------------------------- generations


def three_generations() -> tuple[list[dict[str, bytes]], dict[int, bytes]]:
    """Images of three dumps, newest first, and what the newest shows."""
    oldest = [Pages(at(0), 10, tag=1), Pages(at(20), 4, tag=1)]
    middle = [
        Pages(at(0), 2, PARENT),
        Pages(at(2), 3, tag=2),
        Pages(at(5), 5, PARENT),
        Pages(at(20), 4, PARENT),
    ]
    newest = [
        Pages(at(0), 1, BOTH, tag=3),
        Pages(at(1), 8, PARENT | LAZY),
        Pages(at(9), 1, BOTH, tag=3),
        Pages(at(21), 2, PARENT | LAZY),
    ]
    shown = expected(
        Pages(at(0), 1, tag=3),
        Pages(at(1), 1, tag=1),
        Pages(at(2), 3, tag=2),
        Pages(at(5), 4, tag=1),
        Pages(at(9), 1, tag=3),
        Pages(at(21), 2, tag=1),
    )
    return [written.dump(one_task(*pages)) for pages in (newest, middle, oldest)], shown


async def test_generations_in_directories(tmp_path: Path) -> None:
    sets, shown = three_generations()
    for name, files in zip(("c", "b", "a"), sets, strict=True):
        written.write(tmp_path / name, files)
    (tmp_path / "c" / "parent").symlink_to("../b")
    (tmp_path / "b" / "parent").symlink_to("../a")
    dump = await load(ImageSet(tmp_path / "c"))
    assert await bytes_of(dump.tasks[7]) == shown
    assert [file.name for file in dump.tasks[7].files] == ["pages-1.img"] * 3


async def test_generations_that_are_given(tmp_path: Path) -> None:
    sets, shown = three_generations()
    images = ImageSet(sets[0], parents=[sets[1], written.write(tmp_path, sets[2])])
    assert await bytes_of((await load(images)).tasks[7]) == shown


async def test_generations_in_memory() -> None:
    sets, shown = three_generations()
    files: dict[str, Any] = {**sets[0], "parent": {**sets[1], "parent": sets[2]}}
    assert await bytes_of(await task_of(files)) == shown


async def test_parents_from_before_flags() -> None:
    run = Pages(at(0), 2, tag=4)
    older = written.dump(one_task(run), entry=written.entry_20)
    between = written.dump(one_task(Pages(at(0), 2, PARENT)), entry=written.entry_20)
    newest = written.dump(one_task(Pages(at(0), 2, PARENT | LAZY)))
    files = {**newest, "parent": {**between, "parent": older}}
    assert await bytes_of(await task_of(files)) == expected(run)


async def test_no_parent() -> None:
    files = written.dump(one_task(Pages(at(0), 1, PARENT | LAZY)))
    with pytest.raises(ImageError, match="there are none") as caught:
        await task_of(files)
    assert "parents=" in str(caught.value)


async def test_parent_is_not_asked_for_what_nobody_needs() -> None:
    files = written.dump(one_task(Pages(at(0), 1), Pages(at(4), 1, PARENT)))
    assert len((await task_of(files)).pieces or ()) == 1
    with pytest.raises(ImageError, match="there are none"):
        await task_of(files, everything=True)


async def test_parent_lacks_a_page() -> None:
    files: dict[str, Any] = written.dump(one_task(Pages(at(0), 3, PARENT | LAZY)))
    files["parent"] = written.dump(one_task(Pages(at(0), 2)))
    with pytest.raises(ImageError, match=f"lacks the page at {at(2):#x}"):
        await task_of(files)
    files["parent"] = written.dump(one_task(Pages(at(1), 2)))
    with pytest.raises(ImageError, match=f"lacks the page at {at(0):#x}"):
        await task_of(files)
    files["parent"] = written.dump([Task(8, [(at(0), at(4))], [Pages(at(0), 3)])])
    with pytest.raises(ImageError, match="there are none"):
        await task_of(files)


async def test_parent_has_left_it_to_a_page_server() -> None:
    files: dict[str, Any] = written.dump(one_task(Pages(at(0), 1, PARENT | LAZY)))
    files["parent"] = written.dump(one_task(Pages(at(0), 1, LAZY)))
    with pytest.raises(ImageError, match="does not hold"):
        await task_of(files)


async def test_own_parent(tmp_path: Path) -> None:
    files = written.dump(one_task(Pages(at(0), 1, PARENT | LAZY)))
    written.write(tmp_path, files)
    (tmp_path / "parent").symlink_to(".")
    with pytest.raises(ImageError, match="generations"):
        await load(ImageSet(tmp_path))


async def test_many_generations(tmp_path: Path) -> None:
    """More than the kernel follows links in one path."""
    runs = [Pages(at(index), 1, tag=index + 1) for index in range(60)]
    for index, run in enumerate(runs):
        older = [Pages(at(0), index, PARENT | LAZY)] if index else []
        folder = written.write(tmp_path / str(index), written.dump(one_task(*older, run)))
        if index:
            (folder / "parent").symlink_to(f"../{index - 1}")
    dump = await load(ImageSet(tmp_path / "59"))
    assert await bytes_of(dump.tasks[7]) == expected(*runs)


async def test_a_link_to_nowhere_is_no_parent(tmp_path: Path) -> None:
    written.write(tmp_path, written.dump(one_task(Pages(at(0), 1, PARENT | LAZY))))
    (tmp_path / "parent").symlink_to("gone")
    with pytest.raises(ImageError, match="there are none"):
        await load(ImageSet(tmp_path))


# ------------------------------------------------------------------ from afar


@pytest.mark.parametrize("token", ["", "?signature=secret"])
async def test_images_on_a_server(token: str) -> None:
    sets, shown = three_generations()
    prefixes = ("/dump/", "/dump/parent/", "/dump/parent/parent/")
    objects = {
        prefix + name: data
        for prefix, files in zip(prefixes, sets, strict=True)
        for name, data in files.items()
    }
    async with RangeServer(objects) as server:
        dump = await load(ImageSet(server.url("/dump") + token))
        assert await bytes_of(dump.tasks[7]) == shown
        if token:
            assert all(file.source()[0].endswith(token) for file in dump.tasks[7].files)
            assert "secret" not in repr(dump.images)


async def test_pages_files_are_not_read() -> None:
    sources: dict[str, Any] = written.dump(one_task(Pages(at(0), 2000), vmas=[(at(0), at(2000))]))
    reads = 0

    class Counting:
        size = 2000 * PAGE

        async def read(self, offset: int, length: int) -> bytes:
            nonlocal reads
            reads += 1
            return bytes(length)

        def clone(self) -> Counting:
            return self

    sources["pages-1.img"] = Counting()
    assert (await task_of(sources)).bytes == 2000 * PAGE
    assert not reads


# ---------------------------------------------------------------- broken images


async def test_not_a_dump(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"no .*inventory\.img"):
        await load(ImageSet(tmp_path))
    with pytest.raises(ImageError, match=r"no .*inventory\.img"):
        await load(ImageSet(tmp_path / "nowhere"))
    for wrong in ("", 5, None, b"x"):
        with pytest.raises(UsageError):
            ImageSet(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["pstree.img", "mm-7.img", "pages-1.img"])
async def test_an_image_is_missing(name: str) -> None:
    files = written.dump(one_task(Pages(at(0), 1)))
    del files[name]
    with pytest.raises(ImageError, match=f"no .*{name}"):
        await task_of(files)


async def test_pages_file_too_short() -> None:
    files = written.dump(one_task(Pages(at(0), 3)))
    files["pages-1.img"] = files["pages-1.img"][:-1]
    with pytest.raises(ImageError, match=f"{3 * PAGE - 1} bytes"):
        await task_of(files)


async def test_unknown_version() -> None:
    files = written.dump(one_task(Pages(at(0), 1)))
    files["inventory.img"] = written.inventory(3)
    with pytest.raises(ImageError, match="version 3"):
        await task_of(files)


async def test_an_error_is_a_source_error_that_stays() -> None:
    with pytest.raises(SourceError) as caught:
        await load(ImageSet({}))
    assert not caught.value.transient


FIELD = number(1, 7)
GOOD: dict[str, tuple[Callable[[str, bytes], Any], bytes]] = {
    "inventory": (parse_inventory, written.inventory()),
    "pstree": (parse_pstree, written.pstree([7, 8])),
    "pagemap": (
        parse_pagemap,
        written.pagemap(1, [written.entry_42(at(0), 1, BOTH), written.entry_41(at(3), 2, BOTH)]),
    ),
    "mm": (parse_vmas, written.mm([written.vma(at(0), at(4)), written.vma(at(4), at(8))])),
}


@pytest.mark.parametrize("kind", GOOD)
def test_cut_anywhere(kind: str) -> None:
    """Every beginning of an image is broken, or has fewer records."""
    parse, data = GOOD[kind]
    whole = parse("x", data)
    ends = record_ends(data, 4 if kind == "inventory" else 8)
    for length in range(len(data)):
        if length in ends and (kind in ("pstree", "pagemap") and length > ends[0]):
            assert parse("x", data[:length]) != whole
        else:
            with pytest.raises(ImageError, match="x "):
                parse("x", data[:length])


def record_ends(data: bytes, at: int) -> list[int]:
    ends = [at]
    while at < len(data):
        at += 4 + struct.unpack_from("<I", data, at)[0]
        ends.append(at)
    return ends


@pytest.mark.parametrize("kind", GOOD)
def test_lengths_that_are_too_large(kind: str) -> None:
    parse, data = GOOD[kind]
    at = 4 if kind == "inventory" else 8
    for length in (len(data), 1 << 16, (1 << 32) - 1):
        with pytest.raises(ImageError, match="ends within record 0"):
            parse("x", data[:at] + struct.pack("<I", length) + data[at + 4 :])


@pytest.mark.parametrize("kind", GOOD)
def test_bad_magic(kind: str) -> None:
    parse, data = GOOD[kind]
    at = 0 if kind == "inventory" else 4
    with pytest.raises(ImageError, match="begins with 0xdeadbeef"):
        parse("x", data[:at] + struct.pack("<I", 0xDEADBEEF) + data[at + 4 :])
    for other, (_, image) in GOOD.items():
        if other != kind:
            with pytest.raises(ImageError, match="begins with"):
                parse("x", image)


@pytest.mark.parametrize("kind", GOOD)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_noise(kind: str, data: st.DataObject) -> None:
    """Whatever is in a file, it is read or it is an ImageError."""
    parse, good = GOOD[kind]
    head = 4 if kind == "inventory" else 8
    body = bytearray(good[head:])
    for _ in range(data.draw(st.integers(1, 8))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ImageError):
        parse("x", good[:head] + bytes(body))


BROKEN_PAGEMAPS = {
    "no head": ([], "no pagemap_head"),
    "head without id": ([b""], "no pages_id"),
    "no address": ([FIELD, number(2, 1)], "no vaddr"),
    "no count": ([FIELD, number(1, at(0))], "no compat_nr_pages"),
    "unaligned": ([FIELD, written.entry_42(at(0) + 8, 1, BOTH)], "cannot be"),
    "beyond memory": ([FIELD, written.entry_42((1 << 63) - PAGE, 2, LAZY)], "cannot be"),
    "wraps": ([FIELD, written.entry_42(at(0), (1 << 64) - 1, LAZY)], "cannot be"),
    "overlap": (
        [FIELD, written.entry_42(at(0), 3, BOTH), written.entry_42(at(2), 1, BOTH)],
        f"{at(2):#x} twice",
    ),
    "twice": ([FIELD, written.entry_42(at(0), 1, BOTH), written.entry_41(at(0), 1, 0)], "twice"),
    "overlap, out of order": (
        [FIELD, written.entry_42(at(4), 3, BOTH), written.entry_42(at(2), 3, BOTH)],
        f"{at(4):#x} twice",
    ),
    "no message": ([FIELD, b"\xff\xff\xff\xff"], "is no pagemap_entry"),
    "a varint without end": ([FIELD, b"\x08" + b"\x80" * 11], "is no pagemap_entry"),
}


@pytest.mark.parametrize("case", BROKEN_PAGEMAPS)
def test_broken_pagemap(case: str) -> None:
    messages, reason = BROKEN_PAGEMAPS[case]
    data = written.image(written.PAGEMAP, *messages)
    with pytest.raises(ImageError, match=reason) as caught:
        parse_pagemap("pagemap-7.img", data)
    assert "pagemap-7.img" in str(caught.value)


BROKEN_MM = {
    "unaligned": [written.vma(at(0) + 1, at(1))],
    "empty": [written.vma(at(1), at(1))],
    "backwards": [written.vma(at(2), at(1))],
    "overlap": [written.vma(at(0), at(2)), written.vma(at(1), at(3))],
    "without end": [number(1, at(0))],
}


@pytest.mark.parametrize("case", BROKEN_MM)
def test_broken_mappings(case: str) -> None:
    with pytest.raises(ImageError, match="x has"):
        parse_vmas("x", written.mm(BROKEN_MM[case]))


def test_vsyscall_is_a_mapping_too() -> None:
    high = 0xFFFFFFFFFF600000
    assert parse_vmas("x", written.mm([written.vma(high, high + PAGE)])) == [Vma(high, high + PAGE)]


@pytest.mark.parametrize(
    ("pids", "reason"),
    [([], "no task"), ([7, 8, 7], "pid 7 twice"), ([0], "pid 0"), ([1 << 31], "pid 2147483648")],
)
def test_broken_pstree(pids: list[int], reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        parse_pstree("x", written.pstree(pids))


@pytest.mark.parametrize(
    "vmas",
    [[(at(4), at(8))], [(at(0), at(1)), (at(2), at(4))], [(at(0), at(3))], [(1 << 46, 1 << 47)]],
)
async def test_pages_outside_of_all_mappings(vmas: list[tuple[int, int]]) -> None:
    with pytest.raises(ImageError, match="nothing is mapped"):
        await task_of(written.dump(one_task(Pages(at(0), 4), vmas=vmas)))


async def test_a_huge_image_is_not_read() -> None:
    class Huge:
        size = 1 << 50

        async def read(self, offset: int, length: int) -> bytes:
            raise AssertionError("read")

        def clone(self) -> Huge:
            return self

    files: dict[str, Any] = written.dump(one_task(Pages(at(0), 1)))
    files["pagemap-7.img"] = Huge()
    with pytest.raises(ImageError, match="more than"):
        await task_of(files)


async def test_one_broken_task_of_many() -> None:
    tasks = [Task(pid, [(at(0), at(4))], [Pages(at(0), 1)]) for pid in range(1, 60)]
    files = written.dump(tasks)
    files["pagemap-30.img"] = b"broken"
    with pytest.raises(ImageError, match=r"pagemap-30\.img"):
        await load(ImageSet(files))


async def test_many_tasks() -> None:
    tasks = [Task(pid, dead=True) for pid in range(1, 20001)]
    dump = await load(ImageSet(written.dump(tasks)))
    assert len(dump.tasks) == 20000


# -------------------------------------------------------------------- protobuf


def test_without_protobuf() -> None:
    program = (
        "import sys\n"
        "sys.modules['google.protobuf'] = None\n"
        "sys.modules['google'] = None\n"
        "import aiouffd.serve.criu as criu\n"
        "from aiouffd.errors import UnsupportedError\n"
        "try:\n"
        "    criu.format.parse_pstree('x', bytes.fromhex('19435654303027500200000008 07'))\n"
        "except UnsupportedError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "reading CRIU's images needs protobuf (pip install 'protobuf>=4.22')\n"
    assert done.stderr == ""
