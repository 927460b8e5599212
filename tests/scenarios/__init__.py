"""Programs that tests run in processes of their own; see `tests.support.run`.

A scenario is a function. A coroutine function runs on the main thread, on the loop that the
test chose; a plain one gets that loop's factory as its first argument. What it returns is
printed as JSON. No pytest here: it would double the time that each of them takes to start.
"""
