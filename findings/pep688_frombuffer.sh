#!/usr/bin/env bash
# Who keeps the memory of an object with PEP 688's __buffer__ alive?
#
# A good guess: whoever makes an array of it holds the buffer until the array is gone, as the buffer protocol
# asks for. Seen here: neither NumPy's nor torch's frombuffer() does.
#   - numpy.frombuffer(obj) gives the Py_buffer back at once and keeps `obj` itself, unless the type also has
#     __release_buffer__ (then it makes a memoryview of it, and keeps that).
#   - torch.frombuffer(obj) gives the Py_buffer back at once and keeps only `view.obj`: a bytearray can be resized,
#     and a memoryview released, while the tensor lives.
# So an exporter that counts its exports counts none, and frees memory under the array.
#
# aiouffd exports by a base class of C whose `view.obj` is the memoryview, with a bf_releasebuffer (native/gil.c;
# tests/test_ending.py).
#
# Needs Python 3.12 or later as $PYTHON, and pip. torch, a large download, is looked at if $TORCH names a requirement
# for it (seen with torch 2.13.0 on Python 3.11, by the last part alone).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check numpy==2.3.4 ${TORCH:-}
"$work/venv/bin/python" - <<'END'
import platform
import sys

import numpy


class Exporter:
    """Counts how many users its memory has."""

    def __init__(self):
        self.memory = bytearray(b"0123456789abcdef")
        self.users = 0

    def __buffer__(self, flags):
        self.users += 1
        return memoryview(self.memory)


class Releaser(Exporter):
    def __release_buffer__(self, view):
        self.users -= 1
        view.release()


print("Python", platform.python_version(), "NumPy", numpy.__version__)
plain = Exporter()
array = numpy.frombuffer(plain, dtype="u1")
kept = type(array.base).__name__
print("NumPy, __buffer__ alone: the array keeps", kept)
# Nobody has the bytearray's buffer any more: it can be resized under the array.
try:
    plain.memory += b"more"
    resized = True
except BufferError:
    resized = False
print("NumPy, __buffer__ alone: the memory can be resized under the array:", resized)

both = Releaser()
array = numpy.frombuffer(both, dtype="u1")
print("NumPy, with __release_buffer__: the array keeps", type(array.base).__name__, "users:", both.users)
ok = kept == "Exporter" and resized and type(array.base).__name__ == "memoryview" and both.users == 1

try:
    import torch
except ImportError:
    print("torch: not looked at")
else:
    held = memoryview(bytearray(16))
    tensor = torch.frombuffer(held, dtype=torch.uint8)
    try:
        held.release()
        released = True
    except BufferError:
        released = False
    print("torch", torch.__version__, "a memoryview can be released under the tensor:", released)
    ok = ok and released
sys.exit(0 if ok else "the behaviour has changed")
END
