#!/usr/bin/env bash
# aiohttp 3.14.5: ClientSession(trust_env=True) makes every request wait for a thread of the loop's default executor.
#
# A good engineer would guess: trust_env=True reads a few environment variables (http_proxy, no_proxy), which
# takes microseconds and waits for nobody.
# What happens: each request without an auth= argument also looks for a password in ~/.netrc, by
# loop.run_in_executor(None, ...), whether there is such a file or not, and with the executor busy it does not
# begin. So a program whose worker threads wait for what the request will bring stops for ever.
#
# aiouffd, whose pages are brought by such requests while any number of worker threads wait for them, does not use
# trust_env: aiouffd/sources/_http_proxy.py asks the environment itself (tests/test_http_proxy.py).
#
# Needs Python 3.11 or later (as $PYTHON, or python3) and pip.
set -euo pipefail

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/pip" install -q --disable-pip-version-check aiohttp==3.14.5
env -u http_proxy -u HTTP_PROXY -u all_proxy -u ALL_PROXY HOME="$place" "$place/venv/bin/python" - <<'PYTHON'
import asyncio, sys, threading
from concurrent.futures import ThreadPoolExecutor
import aiohttp
from aiohttp import web

async def main():
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(2))
    app = web.Application()
    app.router.add_get("/", lambda request: web.Response(text="here"))
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
    release = threading.Event()
    busy = [loop.run_in_executor(None, release.wait) for _ in range(2)]
    found = {}
    for trust in (False, True):
        async with aiohttp.ClientSession(trust_env=trust) as session:
            try:
                async with asyncio.timeout(3), session.get(url) as reply:
                    found[trust] = await reply.text()
            except TimeoutError:
                found[trust] = "nothing in 3 s"
    release.set()
    await asyncio.gather(*busy)
    await runner.cleanup()
    print(f"Python {sys.version.split()[0]}, aiohttp {aiohttp.__version__}")
    print("with both threads of the default executor busy, and no ~/.netrc:")
    for trust, text in found.items():
        print(f"  trust_env={trust}: {text}")
    if found != {False: "here", True: "nothing in 3 s"}:
        sys.exit("the behaviour has changed")

asyncio.run(main())
PYTHON
