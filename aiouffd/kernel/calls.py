"""The native module's calls for userfaultfd, typed: the kernel's layer takes ``lib`` from here."""

from __future__ import annotations

from typing import Any, Protocol, cast

from . import lib as _lib

__all__ = ["lib"]


class _Calls(Protocol):
    """See native/abi.h and native/engine.h."""

    AU_USER_MODE_ONLY: int
    AU_VIA_SYSCALL: int
    AU_VIA_DEVICE: int
    AU_VIA_DEVICE_FD: int
    AU_COPY_MODE_DONTWAKE: int
    AU_COPY_MODE_WP: int
    AU_ZEROPAGE_MODE_DONTWAKE: int
    AU_MOVE_MODE_DONTWAKE: int
    AU_MOVE_MODE_ALLOW_SRC_HOLES: int
    AU_WRITEPROTECT_MODE_WP: int
    AU_WRITEPROTECT_MODE_DONTWAKE: int
    AU_CONTINUE_MODE_DONTWAKE: int
    AU_CONTINUE_MODE_WP: int
    AU_POISON_MODE_DONTWAKE: int
    AU_RWPROTECT_MODE_RWP: int
    AU_RWPROTECT_MODE_DONTWAKE: int
    AU_PM_SCAN_WP_MATCHING: int
    AU_PM_SCAN_CHECK_WPASYNC: int
    AU_ENGINE_RAW: int
    AU_ENGINE_OWN: int
    AU_ENGINE_YIELD: int
    AU_ENGINE_REMAPS: int
    AU_DRAIN_LOOP: int
    AU_OP_COPY: int
    AU_OP_ZERO: int
    AU_OP_CONTINUE: int
    AU_OP_MOVE: int
    AU_OP_WRITEPROTECT: int
    AU_OP_RWPROTECT: int
    AU_OP_POISON: int
    AU_OP_WAKE: int
    au_shared: Any

    def au_engine_create(self, fd: int, options: int, error: Any, /) -> Any: ...
    def au_engine_close(self, engine: Any, /) -> None: ...
    def au_engine_free(self, engine: Any, /) -> None: ...
    def au_engine_set_loop(self, engine: Any, tid: int, /) -> None: ...
    def au_engine_drain(self, engine: Any, out: Any, max: int, role: int, /) -> int: ...
    def au_engine_resolve(
        self, engine: Any, op: int, start: int, source: int, length: int, mode: int, done: Any, /
    ) -> int: ...

    def au_abi_open(self, flags: int, via: int, device: int, /) -> int: ...
    def au_abi_api(self, fd: int, features: int, offered: Any, ioctls: Any, /) -> int: ...
    def au_abi_register(self, fd: int, start: int, len: int, mode: int, ioctls: Any, /) -> int: ...
    def au_abi_unregister(self, fd: int, start: int, len: int, /) -> int: ...
    def au_abi_wake(self, fd: int, start: int, len: int, /) -> int: ...
    def au_abi_copy(
        self, fd: int, dst: int, src: int, len: int, mode: int, done: Any, /
    ) -> int: ...
    def au_abi_zeropage(self, fd: int, start: int, len: int, mode: int, done: Any, /) -> int: ...
    def au_abi_continue(self, fd: int, start: int, len: int, mode: int, done: Any, /) -> int: ...
    def au_abi_poison(self, fd: int, start: int, len: int, mode: int, done: Any, /) -> int: ...
    def au_abi_move(
        self, fd: int, dst: int, src: int, len: int, mode: int, done: Any, /
    ) -> int: ...
    def au_abi_writeprotect(self, fd: int, start: int, len: int, mode: int, /) -> int: ...
    def au_abi_rwprotect(self, fd: int, start: int, len: int, mode: int, /) -> int: ...
    def au_abi_set_mode(self, fd: int, enable: int, disable: int, /) -> int: ...
    def au_abi_read(self, fd: int, msgs: Any, max: int, /) -> int: ...
    def au_abi_pagemap_scan(self, fd: int, arg: Any, /) -> int: ...


lib = cast(_Calls, _lib.lib)
