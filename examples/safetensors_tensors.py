"""Some tensors of a model on a server, without downloading it; also of one in several files.

    python examples/safetensors_tensors.py

The safetensors library wants a file's bytes before it shows a tensor. `aiouffd.safetensors` reads
the header alone: each tensor is a NumPy array of which nothing was fetched yet. The library writes
the files here, and reads them as a whole at the end, to compare.

Needs NumPy, aiohttp and safetensors.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

from range_server import served

import aiouffd

try:
    import aiohttp  # noqa: F401  (the HTTP source needs it)
    import numpy as np
    from safetensors.numpy import load_file, save_file
except ImportError as error:
    print(f"skipped: this needs {error.name}; pip install numpy aiohttp safetensors")
    sys.exit(0)

LAYERS = 24
SIDE = 512


def make_layers(numbers: range) -> dict[str, np.ndarray]:
    random = np.random.default_rng(numbers.start)
    tensors = {}
    for number in numbers:
        tensors[f"layers.{number}.weight"] = random.standard_normal((SIDE, SIDE), "f4")
        tensors[f"layers.{number}.bias"] = random.standard_normal(SIDE, "f4")
    return tensors


def check(name: str, found: np.ndarray, known: np.ndarray) -> None:
    if not np.array_equal(found, known):
        raise SystemExit(f"WRONG: {name} is not what the library reads")
    print(f"  {name}: {found.dtype}{list(found.shape)}, mean {found.mean():.6f}, as it should be")


async def one_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file(make_layers(range(LAYERS)), path, {"format": "np"})
    known = load_file(path)
    async with served(path) as url, aiouffd.open(url) as buffer:
        tensors = await aiouffd.safetensors.load(buffer)
        print(f"{url}: {tensors}, {tensors.metadata}")

        # Ahead: both come at the same time, and then nothing waits, not even on this thread.
        names = ["layers.7.weight", "layers.20.bias"]
        await tensors.fetch(*names)
        for name in names:
            check(name, tensors[name], known[name])

        # Or just use it, on another thread, which waits for what it touches.
        row = await asyncio.to_thread(tensors["layers.15.weight"][100].copy)
        check("layers.15.weight, row 100", row, known["layers.15.weight"][100])
        print(f"{buffer.stats.fetched_bytes:,} of {len(buffer):,} bytes fetched")


async def several_files(folder: Path) -> None:
    """A model in shards has an index, which tells which of them to open for a tensor."""
    where = {}
    for shard in range(3):
        layers = make_layers(range(shard * 8, shard * 8 + 8))
        file = f"model-{shard + 1:05}-of-00003.safetensors"
        save_file(layers, folder / file)
        where.update(dict.fromkeys(layers, file))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))

    wanted = ["layers.2.weight", "layers.17.bias"]
    files = aiouffd.safetensors.parse_index(index.read_bytes())
    needed = sorted({files[name] for name in wanted})
    print(f"{wanted} are in {len(needed)} of {len(set(files.values()))} files")
    async with AsyncExitStack() as stack:
        buffers = [await stack.enter_async_context(aiouffd.open(folder / file)) for file in needed]
        tensors = await aiouffd.safetensors.load(*buffers)
        await tensors.fetch(*wanted)
        for name in wanted:
            check(name, tensors[name], load_file(folder / files[name])[name])
        fetched = sum(buffer.stats.fetched_bytes for buffer in buffers)
        total = sum((folder / file).stat().st_size for file in set(files.values()))
        print(f"{fetched:,} of {total:,} bytes fetched")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(one_file(Path(folder)))
        asyncio.run(several_files(Path(folder)))


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    main()
