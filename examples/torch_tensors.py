"""torch tensors over lazy memory: some of a model's bfloat16 weights, from a server.

    python examples/torch_tensors.py

`aiouffd.safetensors` gives tensors over the buffer's memory, by name, and touches none of them.
That is a state dict: a model on "meta" is made of it without fetching anything. torch has no
tensors that are read-only, so the buffer is opened with `writable=True`; what the program writes
stays in its memory. The safetensors library, which reads the file from the disk as a whole, tells
whether the tensors are right.

Needs torch, NumPy, aiohttp and safetensors.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from range_server import served

import aiouffd

try:
    import aiohttp  # noqa: F401  (the HTTP source needs it)
    import numpy  # noqa: F401  (safetensors.torch needs it)
    import torch
    from safetensors.torch import load_file, save_file
except ImportError as error:
    print(f"skipped: this needs {error.name}; pip install torch numpy aiohttp safetensors")
    sys.exit(0)

LAYERS = 12
SIDE = 768
WORDS = 8192


def make(path: Path) -> None:
    torch.manual_seed(1)
    tensors = {"embedding": torch.randn(WORDS, SIDE).bfloat16()}
    for number in range(LAYERS):
        tensors[f"layers.{number}.weight"] = torch.randn(SIDE, SIDE).bfloat16()
        tensors[f"layers.{number}.scale"] = torch.randn(SIDE)
    save_file(tensors, path)


def check(name: str, found: torch.Tensor, known: torch.Tensor) -> None:
    if not torch.equal(found, known):
        raise SystemExit(f"WRONG: {name} is not what the library reads")
    print(
        f"  {name}: {str(found.dtype).removeprefix('torch.')}{list(found.shape)}, as it should be"
    )


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        make(path)
        known = load_file(path)
        async with served(path) as url, aiouffd.open(url, writable=True) as buffer:
            tensors = await aiouffd.safetensors.load(buffer, framework="torch")
            lazy = dict(tensors)
            print(f"{url}: {len(lazy)} tensors")
            print(f"all of them, with {buffer.stats.fetched_bytes:,} of {len(buffer):,} bytes")

            # torch waits for what it touches: on another thread, while this loop fetches.
            words = torch.tensor([5, 700, 4000, 8191])
            vectors = await asyncio.to_thread(torch.embedding, lazy["embedding"], words)
            check("4 rows of embedding", vectors, known["embedding"][words])

            # Fetched ahead, they can be used at once and anywhere.
            await tensors.fetch("layers.6.weight", "layers.6.scale")
            for name in ("layers.6.weight", "layers.6.scale"):
                check(name, lazy[name], known[name])
            layer = torch.nn.Linear(SIDE, SIDE, bias=False, device="meta")
            layer.load_state_dict({"weight": lazy["layers.6.weight"]}, assign=True)
            print(f"  through a layer: {list(layer(vectors).shape)}")
            print(f"{buffer.stats.fetched_bytes:,} of {len(buffer):,} bytes fetched")


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    asyncio.run(main())
