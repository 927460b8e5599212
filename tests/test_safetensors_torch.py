"""The tensors of safetensors files as tensors of torch, and models that are made of them."""

from __future__ import annotations

import asyncio
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

import aiouffd
from aiouffd import UnsupportedError, UsageError
from aiouffd.formats import safetensors
from tests.faulty import PlainSource

torch = pytest.importorskip("torch")
library = pytest.importorskip("safetensors.torch")

BLOCK = 65536
SIDE = 512
LAYERS = 6

pytestmark = pytest.mark.filterwarnings("error")


def model(device: str = "cpu") -> Any:
    torch.manual_seed(1)
    layers = [
        torch.nn.Sequential(torch.nn.Linear(SIDE, SIDE), torch.nn.LayerNorm(SIDE))
        for _ in range(LAYERS)
    ]
    return torch.nn.Sequential(*layers).to(torch.bfloat16).to(device).eval()


@pytest.fixture(scope="module")
def data() -> bytes:
    # A name as that of a part of the model, which is none of torch's own metadata.
    return bytes(library.save(model().state_dict(), {"format": "pt", "0": "text"}))


def header_of(data: bytes) -> int:
    """Bytes of blocks that hold the header."""
    end = 8 + int.from_bytes(data[:8], "little")
    return -(-end // BLOCK) * BLOCK


def bytes_of(tensor: Any) -> list[int]:
    found: list[int] = tensor.clone().reshape(-1).view(torch.uint8).tolist()
    return found


async def test_a_model_fetches_the_header_alone(data: bytes) -> None:
    source = PlainSource(data)
    async with aiouffd.open(source, readahead=0) as buf:
        tensors = await safetensors.load(buf, framework="torch")
        lazy = model("meta")
        lazy.load_state_dict(tensors, assign=True)
        assert source.bytes_read == header_of(data)
        weight = lazy[3][0].weight
        assert weight.data_ptr() == buf.address + tensors.info["3.0.weight"].offset
        assert (weight.dtype, weight.requires_grad) == (torch.bfloat16, True)
        assert not any(part.is_meta for part in lazy.state_dict().values())

        # One layer needs one layer's bytes, and a block at either end.
        given = torch.ones(2, SIDE, dtype=torch.bfloat16)
        with torch.inference_mode():
            found = await asyncio.to_thread(lazy[3], given)
            assert torch.equal(found, model()[3](given))
            needed = sum(part.nbytes for part in lazy[3].state_dict().values())
            assert source.bytes_read <= header_of(data) + needed + 4 * BLOCK
            assert torch.equal(await asyncio.to_thread(lazy, given), model()(given))


async def test_a_model_that_learns_needs_a_writable_buffer(data: bytes) -> None:
    async with aiouffd.open(data, writable=True) as buf:
        lazy = model("meta")
        lazy.load_state_dict(await safetensors.load(buf, framework="torch"), assign=True)
        before = lazy[0][0].bias.clone()
        lazy(torch.ones(1, SIDE, dtype=torch.bfloat16)).float().square().sum().backward()
        torch.optim.SGD(lazy.parameters(), lr=10.0).step()
        assert not torch.equal(lazy[0][0].bias, before)
        again = await safetensors.load(buf, framework="torch")
        assert torch.equal(again["0.0.bias"], lazy[0][0].bias)


@pytest.mark.parametrize("writable", [False, True])
def test_all_types(writable: bool) -> None:
    """As the library reads them, zero-copy, aligned or not, and without a warning."""
    names = sorted(set(safetensors._TORCH.values()) - {"float8_e8m0fnu"})
    made = {name: torch.arange(8).to(torch.float32).to(getattr(torch, name)) for name in names}
    made |= {"empty": torch.zeros(3, 0), "scalar": torch.tensor(7.0), "odd": torch.zeros(3).bool()}
    data = bytes(library.save(made))
    with aiouffd.sync.open(data, writable=writable) as buf, warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors = safetensors.load_sync(buf, framework="torch")
        for name, known in made.items():
            assert (tensors[name].dtype, tensors[name].shape) == (known.dtype, known.shape)
            assert bytes_of(tensors[name]) == bytes_of(known)
            if known.numel():
                assert tensors[name].data_ptr() == buf.address + tensors.info[name].offset


def test_parts_of_bytes_are_for_raw() -> None:
    header = json.dumps({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    with aiouffd.sync.open(len(header).to_bytes(8, "little") + header + b"ab") as buf:
        tensors = safetensors.load_sync(buf, framework="torch")
        with pytest.raises(UnsupportedError, match="raw"):
            tensors["a"]
        assert tensors.raw("a").tobytes() == b"ab"


async def test_shards(data: bytes, tmp_path: Path) -> None:
    state = model().state_dict()
    names = list(state)
    parts = {"one": names[:10], "two": names[10:]}
    sources = {
        file: PlainSource(bytes(library.save({name: state[name] for name in part})))
        for file, part in parts.items()
    }
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    weight_map = safetensors.parse_index(json.dumps(index))
    async with (
        aiouffd.open(sources["one"], readahead=0) as one,
        aiouffd.open(sources["two"], readahead=0) as two,
    ):
        tensors = await safetensors.load_shards(
            weight_map, {"one": one, "two": two}, framework="torch"
        )
        lazy = model("meta")
        lazy.load_state_dict(tensors, assign=True)
        for source in sources.values():
            assert source.bytes_read == header_of(source.data)
        await tensors.fetch("5.0.bias")
        assert torch.equal(lazy[5][0].bias, state["5.0.bias"])
        assert sources["one"].bytes_read == header_of(sources["one"].data)


def test_sync_shards(data: bytes) -> None:
    weight_map = dict.fromkeys(model("meta").state_dict(), "all")
    with aiouffd.sync.open(data) as buf:
        lazy = model("meta")
        tensors = safetensors.load_shards_sync(weight_map, {"all": buf}, framework="torch")
        lazy.load_state_dict(tensors, assign=True)
        assert torch.equal(lazy[0][1].weight, model()[0][1].weight)


async def test_what_is_no_framework(data: bytes) -> None:
    async with aiouffd.open(data) as buf:
        with pytest.raises(UsageError, match="'numpy' or 'torch', not 'pt'"):
            await safetensors.load(buf, framework="pt")  # type: ignore[call-overload]
