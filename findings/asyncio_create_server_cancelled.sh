#!/usr/bin/env bash
# What is left of loop.create_server() that is cancelled?
#
# A good guess: nothing, or a Server that somebody can close. Seen here: cancelled while it waits for its last step, it
# has bound its socket and listens, and whoever called it never got the Server: the port stays taken and connections
# are accepted by the kernel until the loop is closed, and nobody can close it. With start_serving=False there is
# no such step: the server is in hand before it listens.
#
# aiouffd makes its servers with start_serving=False, or from sockets of its own that it closes
# (tests/test_nbd_cancel.py cancels at every await of listening).
#
# Needs a CPython as $PYTHON; installs nothing, for it is the standard library alone.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" - <<'END'
import asyncio
import gc
import platform
import socket
import sys


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def accepts(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


async def cancelled_after(steps, **how):
    """Cancel create_server at its nth suspension. Whether it got so far, and who listens afterwards."""
    port = free_port()
    loop = asyncio.get_running_loop()
    task = loop.create_task(loop.create_server(asyncio.Protocol, "127.0.0.1", port, **how))
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    (result,) = await asyncio.gather(task, return_exceptions=True)
    del task
    if not isinstance(result, asyncio.CancelledError):
        result.close()
        return None
    gc.collect()
    await asyncio.sleep(0.05)
    return await loop.run_in_executor(None, accepts, port)


async def main(**how):
    found = []
    for steps in range(1, 12):
        left = await cancelled_after(steps, **how)
        if left is None:
            break
        found.append(left)
    return found


print("Python", platform.python_version())
plain = asyncio.run(main())
print("somebody listens after create_server() was cancelled at its nth step:", plain)
lazy = asyncio.run(main(start_serving=False))
print("the same with start_serving=False:", lazy)
sys.exit(0 if any(plain) and not any(lazy) else "the behaviour has changed")
END
