"""A buffer as a sequence of bytes, and as what arrays and tensors are made of."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import aiouffd
from aiouffd import SourceError, UnsupportedError, UsageError
from aiouffd.buffers.byte_sequence import ByteSequence
from tests.faulty import FailingSource, PlainSource, final
from tests.support import Counters, content, environment

BLOCK = 65536
SIZE = 4 * BLOCK + 4096


@pytest.fixture
def data() -> bytes:
    return content(SIZE)


class TestSequence:
    def test_all_its_bytes(self, data: bytes) -> None:
        with aiouffd.sync.open(PlainSource(data)) as buf:
            assert bytes(buf) == data
            assert list(buf) == list(data)
            assert list(reversed(buf)) == list(reversed(data))
            assert bytearray(buf) == data
            assert b"".join([buf, b"x"]) == data + b"x"

    async def test_of_a_lazy_buffer(self, data: bytes) -> None:
        async with aiouffd.open(PlainSource(data)) as buf:
            assert await asyncio.to_thread(bytes, buf) == data
            assert await asyncio.to_thread(list, buf) == list(data)
            assert data[SIZE - 100 :] in buf

    def test_what_is_in_it(self) -> None:
        with aiouffd.sync.open(bytes([7, 8]) * BLOCK + b"needle") as buf:
            assert b"needle" in buf
            assert b"" in buf
            assert bytearray(b"eedl") in buf
            assert b"camel" not in buf
            assert 7 in buf
            assert 0xFB not in buf
            for wrong, error in (("text", TypeError), (1.5, TypeError), (256, ValueError)):
                with pytest.raises(error):
                    _ = wrong in buf

    def test_an_empty_one(self) -> None:
        with aiouffd.sync.open(b"") as buf:
            assert (bytes(buf), list(buf), b"x" in buf, b"" in buf) == (b"", [], False, True)
            assert buf.array("u2").shape == (0,)
            assert np.asarray(buf).size == 0

    def test_the_first_byte_fetches_no_more_than_a_block(self, data: bytes) -> None:
        source = PlainSource(data)
        with aiouffd.sync.open(source) as buf:
            assert next(iter(buf)) == data[0]
            assert next(reversed(buf)) == data[-1]
            assert source.bytes_read == BLOCK + SIZE % BLOCK

    def test_a_source_that_failed(self, data: bytes) -> None:
        """An exception, where the memory itself would be SIGBUS."""
        with aiouffd.sync.open(FailingSource(data, 99, final), errors="soft") as buf:
            for use in (bytes, list, lambda buf: b"x" in buf):
                with pytest.raises(SourceError):
                    use(buf)

    def test_a_slice_asks_for_all_at_once(self) -> None:
        source = PlainSource(bytes(64 << 20))
        with aiouffd.sync.open(source, block_size=4096) as buf:
            assert len(buf[1 << 20 : 20 << 20]) == 19 << 20
            assert source.bytes_read == 19 << 20
            assert len(source.reads) < 40

    @pytest.mark.parametrize("key", [slice(None, None, -1), slice(9, -3, 7), slice(-5, 2, -60_001)])
    def test_slices_with_a_step(self, data: bytes, key: slice) -> None:
        with aiouffd.sync.open(PlainSource(data)) as buf:
            assert buf[key] == data[key]
            assert type(buf[key]) is bytes

    @pytest.mark.parametrize("stride", [1 << 20, -(1 << 20)])
    def test_wide_steps_fetch_what_they_take(self, stride: int) -> None:
        size = 64 << 20
        source = PlainSource(bytes(size))
        with aiouffd.sync.open(source, readahead=0) as buf:
            assert buf[::stride] == bytes(64)
            assert source.bytes_read == 64 * BLOCK

    def test_a_slice_with_a_step_holds_little(self) -> None:
        with aiouffd.sync.open(bytes(64 << 20)) as buf:
            tracemalloc.start()
            try:
                assert len(buf[::512]) == (64 << 20) // 512
                assert tracemalloc.get_traced_memory()[1] < 24 << 20
            finally:
                tracemalloc.stop()


class Copied(ByteSequence):
    """The least that a sequence can be."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.longest = 0

    @property
    def view(self) -> memoryview:
        return memoryview(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def _copy_out(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(self.data)
        self.longest = max(self.longest, length)
        return self.data[offset : offset + length]


class TestByCopying:
    """A search without help, and steps, over pieces of ten bytes."""

    @pytest.fixture(autouse=True)
    def _small_steps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("aiouffd.buffers.byte_sequence.STEP", 10)

    @given(
        data=st.binary(max_size=50),
        sub=st.binary(min_size=1, max_size=15),
        start=st.integers(-60, 60),
        end=st.none() | st.integers(-60, 60),
    )
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_find(self, data: bytes, sub: bytes, start: int, end: int | None) -> None:
        assert Copied(data).find(sub, start, end) == data.find(sub, start, end)

    @given(data=st.binary(max_size=50).map(lambda part: bytes(n & 1 for n in part)))
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_find_what_is_there(self, data: bytes) -> None:
        for start in range(0, len(data), 7):
            sub = data[start : start + 13]
            copied = Copied(data)
            assert copied.find(sub) == data.find(sub)
            assert sub in copied
            assert copied.longest <= 10 + 13

    @given(data=st.binary(max_size=50), step=st.integers(-30, 30).filter(bool))
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_steps(self, data: bytes, step: int) -> None:
        copied = Copied(data)
        assert copied[::step] == data[::step]
        assert step == 1 or copied.longest <= max(10, abs(step))


class TestArrays:
    def test_asarray_is_quick_and_copies_nothing(self) -> None:
        size = 32 << 20
        source = PlainSource(bytes(size))
        with aiouffd.sync.open(source) as buf:
            before = time.monotonic()
            array = np.asarray(buf)
            assert time.monotonic() - before < 0.5
            assert (array.dtype, array.shape, source.reads) == ("u1", (size,), [])
            assert array.ctypes.data == buf.address
            del array

    def test_an_array(self, data: bytes) -> None:
        source = PlainSource(data)
        with aiouffd.sync.open(source) as buf:
            array = buf.array("<u8", (16, 32), BLOCK)
            assert not source.reads
            known = np.frombuffer(data, "<u8", 512, BLOCK).reshape(16, 32)
            assert np.array_equal(array, known)
            assert not array.flags.writeable
            assert buf.array("<u4", 3, 5).tolist() == np.frombuffer(data[5:17], "<u4").tolist()
            assert buf.array().shape == (SIZE,)
            assert buf.array("<u8").shape == (SIZE // 8,)
            assert buf.array("f4", ()).shape == ()
            assert buf.array("f4", (0, 7), SIZE).shape == (0, 7)
            assert buf.array([("a", "<u4"), ("b", "<u2")], 2)["b"].tolist() == [0, 0]
            assert buf.array("bfloat16", 4).dtype.itemsize == 2
            del array

    @pytest.mark.parametrize(
        ("dtype", "shape", "offset"),
        [
            ("f4", SIZE, 0),
            ("f4", (SIZE // 4,), 1),
            ("u1", -1, 0),
            ("u1", (4, -2), 0),
            ("u1", 1, -1),
            ("u1", 1, SIZE + 1),
            ("f8", None, 1),
            ("O", 1, 0),
            ("S", 1, 0),
            ("nothing", 1, 0),
            (object(), 1, 0),
            ("u1", (1 << 40, 1 << 40), 0),
        ],
    )
    def test_what_cannot_be(self, data: bytes, dtype: Any, shape: Any, offset: int) -> None:
        with aiouffd.sync.open(data) as buf:
            with pytest.raises(UsageError):
                buf.array(dtype, shape, offset)
            with pytest.raises(TypeError):
                buf.array("u1", "12")

    def test_orders_and_strides(self, data: bytes) -> None:
        source = PlainSource(data)
        known = np.frombuffer(data, "u1")
        with aiouffd.sync.open(source) as buf:
            columns = buf.array("<u4", (16, 32), 8, order="F")
            big = buf.array(">u8", 4)
            every = buf.array("<u8", 8, 16, strides=(4096,))
            back = buf.array("<u2", (2, 3), 64, strides=(-32, 2))
            same = buf.array("<u8", (1 << 40, 2), 8, strides=(0, 8))
            assert not source.reads
            assert np.array_equal(columns, known[8:2056].view("<u4").reshape(32, 16).T)
            assert big.tolist() == [n << 56 for n in (1, 2, 3, 4)]
            assert every.tolist() == [3 + 512 * n for n in range(8)]
            assert back.tolist() == [[9, 0, 0], [5, 0, 0]]
            assert same[12345].tolist() == [2, 3]
            assert buf.array("<u8", (0, 5), SIZE, strides=(8, 8)).shape == (0, 5)
            del columns, big, every, back, same

    @pytest.mark.parametrize(
        ("shape", "offset", "strides", "said"),
        [
            (2, 0, (SIZE,), f"bytes 0 to {SIZE + 8}, and there are {SIZE}"),
            (2, 0, (-8,), "bytes -8 to 8"),
            ((2, 2), 0, (8,), "as many axes"),
            (None, 0, (8,), "need a shape"),
            (1, SIZE, (8,), f"bytes {SIZE} to {SIZE + 8}"),
            ((0,), SIZE + 1, (8,), "there are"),
            (1, 0, (1 << 70,), "too far"),
        ],
    )
    def test_strides_that_cannot_be(
        self, data: bytes, shape: Any, offset: int, strides: Any, said: str
    ) -> None:
        with aiouffd.sync.open(data) as buf, pytest.raises(UsageError, match=said):
            buf.array("<u8", shape, offset, strides=strides)

    def test_what_does_not_fit_is_said_in_bytes(self, data: bytes) -> None:
        with aiouffd.sync.open(data) as buf:
            with pytest.raises(UsageError, match=f"take 8000000 bytes.* {SIZE - 8}$"):
                buf.array("f8", (1000, 1000), 8)
            with pytest.raises(UsageError, match="order is"):
                buf.array("f8", 1, order="K")  # type: ignore[arg-type]
            with pytest.raises(UsageError, match="too long"):
                buf.array("u1", (0, 1 << 70))

    async def test_it_holds_the_memory(self, data: bytes, counters: Counters) -> None:
        async with aiouffd.open(PlainSource(data)) as buf:
            part = buf.array("<u8")[100:200]
        assert (await asyncio.to_thread(part.sum)) == np.frombuffer(data, "<u8")[100:200].sum()
        drained = asyncio.create_task(buf.drained())
        await asyncio.sleep(0)
        assert not drained.done()
        del part
        await drained
        assert counters["live_regions"] == 0

    def test_written_to(self, data: bytes) -> None:
        with aiouffd.sync.open(data, writable=True) as buf:
            buf.array("<u8", 2)[:] = 5, 6
            assert buf[:16] == (5).to_bytes(8, "little") + (6).to_bytes(8, "little")

    def test_without_numpy(self, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "numpy", None)
        with aiouffd.sync.open(data) as buf, pytest.raises(UnsupportedError, match="pip install"):
            buf.array()


class TestTensors:
    @pytest.fixture
    def torch(self) -> Any:
        return pytest.importorskip("torch")

    def test_a_tensor(self, torch: Any, data: bytes) -> None:
        source = PlainSource(data)
        with aiouffd.sync.open(source) as buf, warnings.catch_warnings():
            warnings.simplefilter("error")
            tensor = buf.tensor("int64", (16, 32), BLOCK)
            assert not source.reads
            assert tensor.data_ptr() == buf.address + BLOCK
            assert torch.equal(tensor, torch.arange(512).reshape(16, 32) + BLOCK // 8 + 1)
            half = buf.tensor(torch.bfloat16, 8, 16)
            assert half.view(torch.int16).tolist() == [3, 0, 0, 0, 4, 0, 0, 0]
            assert buf.tensor("int32", 2, 5).tolist() == np.frombuffer(data[5:13], "<i4").tolist()
            assert buf.tensor().shape == (SIZE,)
            assert buf.tensor("float32", ()).shape == ()
            assert buf.tensor("float32", (3, 0)).shape == (3, 0)
            del tensor, half

    async def test_it_holds_the_memory(self, torch: Any, data: bytes) -> None:
        async with aiouffd.open(PlainSource(data)) as buf:
            part = buf.tensor("int64")[100:200]
        assert int(await asyncio.to_thread(part.sum)) == sum(range(101, 201))
        drained = asyncio.create_task(buf.drained())
        await asyncio.sleep(0)
        assert not drained.done()
        del part
        await drained

    def test_written_to(self, torch: Any, data: bytes) -> None:
        with aiouffd.sync.open(data, writable=True) as buf:
            buf.tensor("int64", 2).fill_(9)
            assert buf[:8] == (9).to_bytes(8, "little")

    def test_writing_in_place_is_not_silent(self, torch: Any) -> None:
        """torch has nothing that would refuse it before it writes."""
        program = """
import aiouffd
with aiouffd.sync.open(b"12345678") as buf:
    tensor = buf.tensor()
    assert tensor.clone().fill_(1).sum() == 8
    tensor.fill_(1)
"""
        done = subprocess.run([sys.executable, "-c", program], env=environment(), timeout=60)
        assert done.returncode == -signal.SIGSEGV

    @pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"])
    def test_floats_of_eight_bits(self, torch: Any, dtype: str) -> None:
        with aiouffd.sync.open(bytes(range(256))) as buf, warnings.catch_warnings():
            warnings.simplefilter("error")
            tensor = buf.tensor(dtype, 8, 60)
            assert tensor.view(torch.uint8).tolist() == list(range(60, 68))
            known = buf.array(dtype, 8, 60).astype("f4").tolist()
            assert tensor.to(torch.float32).tolist() == known
            del tensor

    @pytest.mark.parametrize("dtype", ["f4", "nothing", int, None, "tensor"])
    def test_what_is_no_type(self, torch: Any, data: bytes, dtype: Any) -> None:
        with aiouffd.sync.open(data) as buf, pytest.raises(UsageError, match="torch"):
            buf.tensor(dtype)

    def test_without_torch(self, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        with aiouffd.sync.open(data) as buf, pytest.raises(UnsupportedError, match="pip install"):
            buf.tensor()


@pytest.mark.parametrize("make", [lambda b: b.array("u1"), lambda b: b.view], ids=["array", "view"])
def test_after_the_buffer(data: bytes, make: Callable[[Any], Any]) -> None:
    with aiouffd.sync.open(PlainSource(data)) as buf:
        held = make(buf)
    assert bytes(held[:100]) == data[:100]
