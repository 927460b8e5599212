"""The README's first example, ended while a worker waits for the server: the user sees why."""

from __future__ import annotations

import contextlib
import http.server
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support import Process, wait_until
from tests.test_readme import BASE, _blocks

SIZE = 4 << 22
#: Seconds from the last Ctrl-C to the end of the process: two, but for a machine that is busy.
SOON = 8.0
#: Seconds for what is not about time.
LIMIT = 30.0

#: What the program needs is loaded by root, whose Python nobody else may be able to read.
AS_NOBODY = """
import ctypes, os, aiohttp, uvloop, aiouffd.sources.http, asyncio, numpy, concurrent.futures.thread
import encodings.idna
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE
"""
USERS = ["this user", pytest.param("nobody", marks=pytest.mark.needs_root)]
TOUCH = "        print(await asyncio.to_thread(part.mean))  # fetches what it touches\n"
WAYS = {
    "Ctrl-C": TOUCH,
    "exception": """\
        told = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(10, told.set)  # SIGUSR1
        worker = asyncio.create_task(asyncio.to_thread(part.mean))
        await told.wait()
        raise RuntimeError("the program's own")
""",
    "timeout": """\
        async with asyncio.timeout(0.3):
            await asyncio.to_thread(part.mean)
""",
}
RAISED = {
    "Ctrl-C": "KeyboardInterrupt",
    "exception": "RuntimeError: the program's own",
    "timeout": "TimeoutError",
}


class Held(http.server.ThreadingHTTPServer):
    """Serves ranges of a file of zeros; those from the middle on when it is let."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.go = threading.Event(), threading.Event()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Held

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop = 0, SIZE
        if wanted:
            start, stop = int(wanted[1]), min(int(wanted[2] or SIZE) + 1, SIZE)
        if start >= 1 << 20:
            self.server.asked.set()
            self.server.go.wait()
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", '"1"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{SIZE}")
        self.end_headers()
        with contextlib.suppress(OSError):
            if self.command == "GET":
                self.wfile.write(bytes(stop - start))

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def example(loop: str, user: str, way: str) -> Iterator[tuple[Held, Process]]:
    """The program, with a worker that waits for the server."""
    server = Held()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    program = _blocks("python")[0].replace(BASE, f"http://127.0.0.1:{server.server_port}")
    assert TOUCH in program
    program = program.replace(TOUCH, WAYS[way])
    if loop == "uvloop":
        program = program.replace("asyncio.run(main())", "import uvloop\n\n\nuvloop.run(main())")
    if user == "nobody":
        program = AS_NOBODY + program
    try:
        with Process([sys.executable, "-c", program]) as process:
            yield server, process
    finally:
        server.go.set()
        server.shutdown()
        server.server_close()


def end(server: Held, process: Process, way: str) -> None:
    """What the user, or the program, does once the worker waits."""
    assert server.asked.wait(30), process.stderr()
    if way == "Ctrl-C":
        process.popen.send_signal(signal.SIGINT)
    elif way == "exception":
        process.popen.send_signal(signal.SIGUSR1)


def check(process: Process, way: str, statuses: set[int], limit: float) -> None:
    outcome = process.wait(limit)
    assert outcome.status in statuses, outcome.stderr
    assert "Traceback (most recent call last)" in outcome.stderr
    assert RAISED[way] in outcome.stderr
    assert "Bus error" not in outcome.stderr


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("way", WAYS)
def test_a_slow_server_is_waited_for(loop_name: str, way: str, user: str) -> None:
    with example(loop_name, user, way) as (server, process):
        end(server, process, way)
        time.sleep(0.5)  # a while, in which nothing must end or die
        assert process.popen.poll() is None, process.stderr()
        server.go.set()
        check(process, way, {-signal.SIGINT} if way == "Ctrl-C" else {1}, LIMIT)
        assert process.stderr().rstrip().splitlines()[-1] == RAISED[way]


@pytest.mark.slow
@pytest.mark.parametrize("user", USERS)
def test_a_dead_server_is_named_and_another_interrupt_ends(loop_name: str, user: str) -> None:
    with contextlib.ExitStack() as stack:
        # All at a time: each says what it waits for only after some seconds.
        running = {way: stack.enter_context(example(loop_name, user, way)) for way in WAYS}
        for way, (server, process) in running.items():
            end(server, process, way)
        for way, (_, process) in running.items():
            wait_until(
                lambda process=process: "waits for byte" in process.stderr(),  # type: ignore[misc]
                f"the message ({way}): {process.stderr()}",
            )
            assert "/weights.bin" in process.stderr()
            process.popen.send_signal(signal.SIGINT)
        for way, (_, process) in running.items():
            check(process, way, {-signal.SIGINT, 1}, SOON)
            assert "KeyboardInterrupt" in process.stderr()
