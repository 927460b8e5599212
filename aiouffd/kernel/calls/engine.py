"""What ``native/cdef/engine.h`` declares. Made by ``make calls``."""

from __future__ import annotations

from typing import Protocol

from .abi import UffdMsgPtr
from .pointers import Bytes, Int64s, Ints, Text, Uint32s, Uint64s

__all__ = ["EngineCalls", "EnginePtr", "EntryPtr", "NotePtr", "RegionPtr", "SharedPtr", "WaitPtr"]


class EnginePtr(Protocol):
    fd: int
    notify_fd: int
    grace_ns: int
    patience_ns: int
    stall_ns: int
    flood: int
    stuck: int
    urgent: int


class RegionPtr(Protocol):
    id: int
    kind: int
    memfd: int
    start: int
    length: int
    object_length: int
    page_size: int
    block_size: int
    pages: int
    blocks: int
    serial: int


class EntryPtr(Protocol):
    kind: int
    region: int
    block: int
    generation: int
    thread: int
    message: UffdMsgPtr


class SharedPtr(Protocol):
    proof: int
    sequence: int
    exiting: int
    stalled: int


class NotePtr(Protocol):
    kind: int
    tid: int
    address: int
    waited_ns: int


class WaitPtr(Protocol):
    at: int
    found: int


class EngineCalls(Protocol):
    AU_ENTRY_MISS: int
    AU_ENTRY_HIT: int
    AU_ENTRY_EVENT: int
    AU_ENTRY_RAW: int
    AU_ENGINE_RAW: int
    AU_ENGINE_OWN: int
    AU_ENGINE_YIELD: int
    AU_ENGINE_REMAPS: int
    AU_DRAIN_LOOP: int
    AU_DRAIN_RESCUE: int
    AU_KIND_ANONYMOUS: int
    AU_KIND_MEMFD: int
    AU_KIND_HUGETLB: int
    AU_KIND_HUGETLB_MEMFD: int
    AU_REGION_WRITABLE: int
    AU_REGION_REPORT_HITS: int
    AU_REGION_FORK: int
    AU_REGION_SERVE: int
    AU_REGION_USER_MODE: int
    AU_PAGE_MISSING: int
    AU_PAGE_PRESENT: int
    AU_PAGE_POISONED: int
    AU_OP_COPY: int
    AU_OP_ZERO: int
    AU_OP_POISON: int
    AU_OP_CONTINUE: int
    AU_OP_MOVE: int
    AU_OP_WRITEPROTECT: int
    AU_OP_RWPROTECT: int
    AU_OP_WAKE: int
    AU_NOTE_STALL_POISON: int
    AU_NOTE_MASKED: int
    AU_NOTE_LOOP_STUCK: int
    AU_NOTE_SELF_TOUCH: int
    AU_NOTE_RENEWED: int
    AU_EHWPOISON: int
    au_shared: SharedPtr

    def au_engine_create(self, fd: int, options: int, error: Ints, /) -> EnginePtr: ...
    def au_engine_close(self, engine: EnginePtr, /) -> None: ...
    def au_engine_free(self, engine: EnginePtr, /) -> None: ...
    def au_engine_set_loop(self, engine: EnginePtr, tid: int, /) -> None: ...
    def au_engine_set_times(
        self, engine: EnginePtr, grace_ns: int, patience_ns: int, stall_ns: int, /
    ) -> None: ...
    def au_engine_drain(self, engine: EnginePtr, out: EntryPtr, max: int, role: int, /) -> int: ...
    def au_engine_blocked(
        self, engine: EnginePtr, pages: Uint64s, tids: Uint32s, max: int, /
    ) -> int: ...
    def au_engine_resolve(
        self,
        engine: EnginePtr,
        op: int,
        start: int,
        source: int,
        length: int,
        mode: int,
        done: Int64s,
        /,
    ) -> int: ...
    def au_engine_notify(self, engine: EnginePtr, /) -> None: ...
    def au_region_create(
        self,
        engine: EnginePtr,
        length: int,
        kind: int,
        options: int,
        block_size: int,
        error: Ints,
        /,
    ) -> RegionPtr: ...
    def au_engine_name(self, region: RegionPtr, name: Text, /) -> None: ...
    def au_region_set_backing(self, region: RegionPtr, data: Bytes, length: int, /) -> int: ...
    def au_region_begin(
        self, region: RegionPtr, first: int, count: int, heal: int, taken: Bytes, /
    ) -> int: ...
    def au_region_end(
        self, region: RegionPtr, first: int, count: int, keep_wanted: int, wanted: Bytes, /
    ) -> int: ...
    def au_region_check(
        self, region: RegionPtr, offset: int, length: int, where: Uint64s, /
    ) -> int: ...
    def au_region_runs(
        self,
        region: RegionPtr,
        offset: int,
        length: int,
        starts: Uint64s,
        lengths: Uint64s,
        states: Bytes,
        max: int,
        next: Uint64s,
        /,
    ) -> int: ...
    def au_region_generation(self, region: RegionPtr, block: int, /) -> int: ...
    def au_region_drop(self, region: RegionPtr, offset: int, length: int, /) -> int: ...
    def au_error_runs(self) -> int: ...
    def au_error_set_limit(self, runs: int, /) -> None: ...
    def au_region_inherited(self, region: RegionPtr, /) -> int: ...
    def au_region_close(self, region: RegionPtr, unmap: int, /) -> int: ...
    def au_region_free(self, region: RegionPtr, /) -> None: ...
    def au_region_put(
        self,
        region: RegionPtr,
        op: int,
        offset: int,
        src: Bytes,
        length: int,
        over_poison: int,
        generation: int,
        /,
    ) -> int: ...
    def au_region_present(self, region: RegionPtr, /) -> int: ...
    def au_region_poisoned(self, region: RegionPtr, /) -> int: ...
    def au_region_touched(self, region: RegionPtr, /) -> int: ...
    def au_region_read(
        self, region: RegionPtr, offset: int, destination: Bytes, length: int, where: Uint64s, /
    ) -> int: ...
    def au_region_touch(
        self, region: RegionPtr, offset: int, length: int, where: Uint64s, /
    ) -> int: ...
    def au_region_find(
        self,
        region: RegionPtr,
        offset: int,
        length: int,
        needle: Bytes,
        needle_length: int,
        where: Uint64s,
        found: Int64s,
        /,
    ) -> int: ...
    def au_wait_read(
        self, region: RegionPtr, offset: int, destination: Bytes, length: int, wait: WaitPtr, /
    ) -> int: ...
    def au_wait_find(
        self,
        region: RegionPtr,
        offset: int,
        length: int,
        needle: Bytes,
        needle_length: int,
        wait: WaitPtr,
        /,
    ) -> int: ...
    def au_wait_end(self, wait: WaitPtr, /) -> None: ...
    def au_mapped(self, address: int, length: int, /) -> int: ...
    def au_sentry_start(self) -> int: ...
    def au_sentry_sees(self) -> int: ...
    def au_sentry_take_note(self, note: NotePtr, /) -> int: ...
    def au_rescue_wait(self, timeout_ms: int, /) -> int: ...
    def au_rescue_fd(self) -> int: ...
    def au_rescue_take(self, engine: EnginePtr, /) -> int: ...
    def au_rescue_wake(self) -> None: ...
    def au_gil_exit(self) -> None: ...
    def au_gil_leave_behind(self, left: int, daemon: int, /) -> int: ...
    def au_python_exporter(self, module: Text, /) -> int: ...
    def au_gil_know_handler(self) -> None: ...
    def au_handler_signal(self) -> int: ...
    def au_handler_send(self, tid: int, /) -> int: ...
    def au_counter_name(self, which: int, /) -> Text: ...
    def au_counter_value(self, which: int, /) -> int: ...
    def au_gettid(self) -> int: ...
