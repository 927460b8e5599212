#!/usr/bin/env bash
# torch has no read-only tensors, but it refuses to change inference tensors in place. Is that a protection?
#
# A good guess: what raises "Inplace update to inference tensor outside InferenceMode is not allowed" has changed
# nothing. Seen here: the tensor has been changed when the error comes, by fill_, add_, assignment to an item and out=
# alike: the check comes with the counting of versions, after the operation. So for memory that must not be written
# (a read-only mapping) the process dies by SIGSEGV before there is an error.
#
# aiouffd therefore gives ordinary tensors over read-only memory, says that writing in place is SIGSEGV
# (LazyBuffer.tensor, docs/formats.md), and tests that it is not silent (tests/test_arrays.py).
#
# Needs Python 3.11 or later as $PYTHON, and pip. torch is a large download; $TORCH may name another requirement for
# it (torch==2.13.0+cpu where there is one, as it was seen).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check "${TORCH:-torch==2.13.0}"
"$work/venv/bin/python" -W ignore - <<'END'
import sys

import torch


def with_out(tensor):
    torch.add(tensor, 1, out=tensor)


print("Python", sys.version.split()[0], "torch", torch.__version__)
writes = {
    "fill_": lambda tensor: tensor.fill_(1),
    "add_": lambda tensor: tensor.add_(1),
    "tensor[0] = 1": lambda tensor: tensor.__setitem__(0, 1),
    "out=": with_out,
}
written = []
for name, write in writes.items():
    memory = bytearray(4)
    with torch.inference_mode():
        tensor = torch.frombuffer(memory, dtype=torch.uint8)
    try:
        write(tensor)
        sys.exit(f"{name}: no error")
    except RuntimeError as error:
        print(f"{name}: {str(error).split('.')[0]}; the memory is {memory.hex()}")
        written.append(any(memory))
sys.exit(0 if all(written) else "the behaviour has changed")
END
