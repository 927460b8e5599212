#!/usr/bin/env bash
# Does asyncio.run() look at what the coroutine returned?
#
# A good guess: it hands the result on untouched. Seen here: on the main thread of Python 3.11 and 3.12 it formats the
# result's repr, twice; 3.13 no longer does.
# asyncio.Runner.run() asks `signal.getsignal(SIGINT)` whether its own handler is still installed. getsignal()
# tries to make an enum member of the answer, and the ValueError of that try, which is dropped, has the repr of the
# handler in its message: a functools.partial over the main task, whose repr has the repr of the result.
# Costly for large results, and a touch of lazy memory on the loop's own thread: `return array` out of
# asyncio.run() makes NumPy read both ends of the array.
#
# aiouffd serves that touch as any other of the loop's own thread (tests/test_ending.py,
# test_an_array_out_of_asyncio_run); a BlockingTouchWarning may name numpy/_core/arrayprint.py.
#
# Needs a CPython as $PYTHON; installs nothing, for it is the standard library alone.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" - <<'END'
import asyncio
import platform
import sys
import threading


class Result:
    formatted = 0

    def __repr__(self):
        Result.formatted += 1
        return "Result()"


async def main():
    return Result()


asyncio.run(main())
on_main = Result.formatted
thread = threading.Thread(target=asyncio.run, args=(main(),))
thread.start()
thread.join()
elsewhere = Result.formatted - on_main
print("Python", platform.python_version())
print("repr() of the result, asyncio.run() on the main thread:", on_main, "times")
print("repr() of the result, asyncio.run() on another thread:", elsewhere, "times")
expected = 2 if sys.version_info < (3, 13) else 0
sys.exit(0 if (on_main, elsewhere) == (expected, 0) else "the behaviour has changed")
END
