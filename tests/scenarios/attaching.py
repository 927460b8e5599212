"""Programs that attach to a server which dies, goes, or never answers."""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiouffd
from aiouffd.kernel.lib import PAGE_SIZE
from tests.scenarios.forking import in_child, is_mapped, userfaultfds
from tests.scenarios.gil_yield import TOUCHES, NewLoop
from tests.support import WORD, content, wait_until, word

kept: list[Any] = []


def keeper() -> Path | None:
    """The native thread of an attachment, in /proc."""
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() == "aiouffd-keeper":
            return task
    return None


def waits(thread: threading.Thread) -> bool:
    """Whether it waits in the kernel for a page."""
    where = Path(f"/proc/self/task/{thread.native_id}/wchan").read_text()
    return where in ("handle_userfault", "userfaultfd_event_wait_completion")


def say(text: str) -> None:
    print(text, flush=True)


def block_signal() -> None:
    """Before any thread: `told` is for one of them only."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


def told() -> None:
    """Wait for SIGUSR1."""
    signal.sigwait({signal.SIGUSR1})


# ---------------------------------------------------------------------- a dead server


def touch_with_gil(_: NewLoop, path: str, way: str) -> int:
    """Everything in this process stands still while the main thread waits; who helps is outside."""
    with aiouffd.attach(path) as memory:
        view = memory.view
        say("begins")
        return TOUCHES[way](view, 3 * PAGE_SIZE)


# ------------------------------------------------------------------------------ close


def closed_below(_: NewLoop, path: str, way: str, wait: bool = False) -> Any:
    """What threads get that wait while somebody closes, or, with ``wait``, after SIGUSR1."""
    block_signal()
    memory = aiouffd.attach(path).open()
    found: list[Any] = []

    def touch() -> None:
        try:
            if way == "copy":
                found.append(memory[PAGE_SIZE : PAGE_SIZE + WORD])
            elif way == "fetch":
                memory.fetch()
                found.append("fetched")
            elif way == "discard":
                memory.discard(PAGE_SIZE, PAGE_SIZE)
                found.append("discarded")
            else:
                found.append(TOUCHES[way](view, PAGE_SIZE))
        except Exception as error:
            found.append(f"{type(error).__name__}")

    view = memory.view
    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    wait_until(lambda: waits(thread), "the thread to wait")
    if wait:
        say("begins")
        told()
    memory.close(force=True)
    thread.join(10)
    return found


def exception_beside_a_touch(_: NewLoop, path: str) -> Any:
    """Leaving `with` by an exception while a thread waits, which gets its bytes."""
    found: list[int] = []

    def touch(views: list[memoryview]) -> None:
        found.append(TOUCHES["memcpy"](views.pop(), PAGE_SIZE))

    block_signal()
    try:
        with aiouffd.attach(path) as memory:
            say("begins")
            told()
            thread = threading.Thread(target=touch, args=([memory.view],))
            thread.start()
            wait_until(lambda: waits(thread), "the thread to wait")
            raise ValueError("the user's own")
    except ValueError:
        say("left")
    thread.join(10)
    wait_until(lambda: keeper() is None, "the memory to go")
    return found


def after_close(_: NewLoop, path: str, page: int, force: bool) -> Any:
    """A view after `close`: it is served on, or by force what was there is there."""
    memory = aiouffd.attach(path).open()
    view = memory.view
    assert struct.unpack_from("<Q", view, 0)[0] == word(0)
    memory.close()
    if force:
        memory.close(force=True)
    assert keeper() is not None
    value: int = struct.unpack_from("<Q", view, page * PAGE_SIZE)[0]
    del view
    assert keeper() is None
    assert userfaultfds() == 0
    return value


def never_zeros(_: NewLoop, path: str, rounds: int) -> Any:
    """Children touch all they can while it is closed: bytes, or a signal."""
    found = {"bytes": 0, "signals": 0}
    for seed in range(rounds):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            signal.alarm(20)
            status = 3
            try:
                _touch_and_close(path, seed, writer)
                status = 0
            finally:
                os._exit(status)
        os.close(writer)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) in (signal.SIGBUS, signal.SIGSEGV), status
            found["signals"] += 1
        else:
            assert os.WEXITSTATUS(status) == 0, status
        while piece := os.read(reader, WORD * 2):
            at, value = struct.unpack("<2Q", piece)
            assert value == word(at), f"{value} at {at}"
            found["bytes"] += 1
        os.close(reader)
    return found


def _touch_and_close(path: str, seed: int, writer: int) -> None:
    memory = aiouffd.attach(path).open()
    pages = len(memory) // PAGE_SIZE
    address = memory.address
    libc = ctypes.CDLL(None)
    begun = threading.Semaphore(0)

    def touch(number: int) -> None:
        choice = random.Random(seed * 10 + number)
        target = ctypes.create_string_buffer(WORD)
        begun.release()
        for page in choice.sample(range(pages), pages):
            at = page * PAGE_SIZE
            libc.memcpy(target, ctypes.c_void_p(address + at), ctypes.c_size_t(WORD))
            os.write(writer, struct.pack("<Q", at) + target.raw)

    threads = [threading.Thread(target=touch, args=(number,), daemon=True) for number in range(3)]
    for thread in threads:
        thread.start()
    for _ in threads:
        begun.acquire()
    memory.fetch(0, random.Random(seed).randrange(1, pages // 4) * PAGE_SIZE)
    # Nothing refers to the memory by then but bare pointers.
    memory.close(force=True)
    for thread in threads:
        thread.join()


# ------------------------------------------------------------------------------- exit


def exit_beside(_: NewLoop, path: str, way: str, daemon: bool) -> None:
    """Ends with status 7 while a thread waits for a page."""
    memory = aiouffd.attach(path).open()
    view = memory.view
    kept.append((memory, view))

    def touch() -> None:
        assert TOUCHES[way](view, PAGE_SIZE) == word(PAGE_SIZE)
        say("touched")

    thread = threading.Thread(target=touch, daemon=daemon)
    thread.start()
    wait_until(lambda: waits(thread), "the thread to wait")
    say("begins")
    sys.exit(7)


# ------------------------------------------------------------------------------- fork


def forked(_: NewLoop, path: str) -> Any:
    """What a child has, and that its parent is as before."""
    memory = aiouffd.attach(path, writable=True).open()
    view = memory.view
    address = memory.address
    assert TOUCHES["struct"](view, 0) == word(0)

    def tries() -> dict[str, Any]:
        mapped = is_mapped(address)
        calls: dict[str, Callable[[], Any]] = {
            "view": lambda: memory.view,
            "[0]": lambda: memory[0],
            "[0:8]": lambda: memory[0:8],
            "fetch": lambda: memory.fetch(),
            "discard": lambda: memory.discard(0, PAGE_SIZE),
            "address": lambda: memory.address,
            "connected": lambda: memory.connected,
        }
        said = {}
        for name, call in calls.items():
            try:
                said[name] = f"returned {call()!r}"
            except Exception as error:
                said[name] = type(error).__name__
        memory.close()
        own = aiouffd.attach(path).open()
        value = own[PAGE_SIZE : PAGE_SIZE + WORD] == content(len(own))[PAGE_SIZE:][:WORD]
        count = userfaultfds()
        own.close()
        return {"mapped": mapped, "said": said, "own": value, "userfaultfds": count}

    answer: dict[str, Any] = in_child(tries)
    answer["raw"] = in_child(lambda: TOUCHES["struct"](view, 0))
    assert memory.connected
    assert memory[:] == content(len(memory))
    memory.close()
    return answer


# -------------------------------------------------------------------------- given up


def given_up(_: NewLoop, path: str, raw: bool) -> Any:
    """The server goes for good while this waits for pages."""
    block_signal()
    memory = aiouffd.attach(path, writable=True, lost_timeout=0.2).open()
    view = memory.view
    memory.fetch(0, 2 * PAGE_SIZE)
    memory.discard(PAGE_SIZE, PAGE_SIZE)
    say("begins")
    told()
    found = {}
    try:
        found["copy"] = repr(memory[5 * PAGE_SIZE])
    except aiouffd.SourceError as error:
        found["copy"] = type(error).__name__
    found["there"] = TOUCHES["struct"](view, 0)
    found["removed"] = TOUCHES["struct"](view, PAGE_SIZE)
    # Nobody else reads events now.
    memory.discard(0, PAGE_SIZE)
    memory.discard(7 * PAGE_SIZE, PAGE_SIZE)
    found["removed late"] = [TOUCHES["struct"](view, page * PAGE_SIZE) for page in (0, 7)]
    found["connected"] = memory.connected
    try:
        _, writer = os.pipe()
        os.write(writer, view[6 * PAGE_SIZE :][:WORD])
        found["write"] = "went"
    except OSError as error:
        found["write"] = error.strerror
    say(json.dumps(found))
    if raw:
        TOUCHES["struct"](view, 6 * PAGE_SIZE)
    memory.close()
    return found


def aborted(_: NewLoop, path: str) -> None:
    kept.append(aiouffd.attach(path, lost_timeout=0.1, on_lost="abort").open())
    say("begins")
    while True:
        signal.pause()


# ------------------------------------------------------------------------------- load

ZEROS, OURS = object(), object()


def load(_: NewLoop, path: str, seed: int, operations: int) -> dict[str, int]:
    """Attach, touch in all ways, write, discard and check, again and again, until SIGUSR1."""
    block_signal()
    counts = {"rounds": 0, "touched": 0, "discarded": 0, "resumed": 0}
    ended = threading.Event()

    def listen() -> None:
        told()
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    while not ended.is_set():
        failures: list[BaseException] = []
        with aiouffd.attach(path, writable=True, timeout=None) as memory:
            workers = [
                threading.Thread(
                    target=_guarded,
                    args=(failures, _work, memory, number, seed * 100 + counts["rounds"], counts),
                    kwargs={"operations": operations},
                )
                for number in range(3)
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            counts["resumed"] += memory.resumed
        if failures:
            raise failures[0]
        counts["rounds"] += 1
    return counts


def _guarded(
    failures: list[BaseException], function: Callable[..., None], *args: Any, **more: Any
) -> None:
    try:
        function(*args, **more)
    except BaseException as error:
        failures.append(error)


def _work(
    memory: aiouffd.Attachment, number: int, seed: int, counts: dict[str, int], operations: int
) -> None:
    choice = random.Random(seed * 10 + number)
    view = memory.view
    pages = range(number, len(memory) // PAGE_SIZE, 3)
    kernel = [] if memory.user_mode_only else ["write"]
    model: dict[int, object] = {}

    def expected(page: int) -> bytes:
        start = page * PAGE_SIZE
        state = model.get(page)
        if state is ZEROS:
            return bytes(PAGE_SIZE)
        if state is OURS:
            return bytes([page % 255 + 1]) * PAGE_SIZE
        return content(len(memory))[start : start + PAGE_SIZE]

    def check(page: int) -> None:
        start = page * PAGE_SIZE
        way = choice.choice(["copy", "bytes", "struct", "memcpy", *kernel])
        counts["touched"] += 1
        if way == "copy":
            assert memory[start : start + PAGE_SIZE] == expected(page), page
        elif way == "bytes":
            assert bytes(view[start : start + PAGE_SIZE]) == expected(page), page
        else:
            value = TOUCHES[way](view, start)
            assert value == int.from_bytes(expected(page)[:WORD], "little"), (page, value)

    for _ in range(operations):
        page = choice.choice(pages)
        match choice.randrange(6):
            case 0:
                view[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = (
                    bytes([page % 255 + 1]) * PAGE_SIZE
                )
                model[page] = OURS
            case 1:
                memory.discard(page * PAGE_SIZE, PAGE_SIZE)
                model[page] = ZEROS
                counts["discarded"] += 1
            case _:
                check(page)
    for page in model:
        check(page)
