#!/usr/bin/env bash
# obstore 0.12.1 refuses a partial reply that is legal, and hands out one that is not what it says.
#
# A good engineer would guess: where a server sends less of a range than was asked for, and says so in Content-Range
# (RFC 9110, 15.3.7, allows that), a reader of ranges gets what came, or the rest is asked for; and a body that has another length than its Content-Range is an error.
# What happens: the other way round. The first is an error of the general class ("Requested 0..1000, got 0..400"), its
# bytes are thrown away, and a retry does the same. The second is given as the answer: `reply.range` says 0 to 1000, and
# `reply.bytes()` has 1,007 bytes.
#
# aiouffd asks again for the part that the message names, and then for the rest, and remembers a server's limit; it
# counts the bytes of every body (tests/test_object_source.py: test_the_rest_of_a_shorter_reply_is_asked_for,
# test_failures).
#
# Needs Python 3.11 or later (as $PYTHON, or python3) and pip.
set -euo pipefail

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/pip" install -q --disable-pip-version-check obstore==0.12.1
env -u http_proxy -u HTTP_PROXY -u all_proxy -u ALL_PROXY "$place/venv/bin/python" - <<'PYTHON'
import sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import obstore
from obstore.store import HTTPStore

DATA = bytes(range(256)) * 40

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        extra = b""
        if self.path == "/shorter":
            last = min(last, first + 399)
        if self.path == "/longer":
            extra = b"7 bytes"
        body = DATA[first : last + 1] + extra
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(DATA)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
base = f"http://127.0.0.1:{server.server_port}/"
store = HTTPStore(base, client_options={"allow_http": True}, retry_config={"max_retries": 0})
print(f"Python {sys.version.split()[0]}, obstore {obstore.__version__}")
found = {}
for path in ("exact", "shorter", "longer"):
    try:
        reply = obstore.get(store, path, options={"range": (0, 1000)})
        text = f"range {reply.range}, {len(reply.bytes())} bytes"
    except Exception as error:
        text = type(error).__name__ + ": " + str(error).partition("\n")[0]
    print(f"  {path}: {text}")
    found[path] = text
server.shutdown()
expected = {
    "exact": "range (0, 1000), 1000 bytes",
    "shorter": "GenericError: Generic HTTP error: Requested 0..1000, got 0..400",
    "longer": "range (0, 1000), 1007 bytes",
}
if found != expected:
    sys.exit("the behaviour has changed")
PYTHON
