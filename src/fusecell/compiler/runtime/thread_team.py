"""The threads that run a call together: the OpenMP team that torch has already.

torch's operators leave their threads spinning for the next one. Threads of our own would have to share cores with them;
so where torch brings an OpenMP runtime with GNU's entry, as on Linux, a call's team is that one. Elsewhere it is of
Python's threads, which kernels let go of the lock for.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import time
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusecell.compiler.backend import tuning
from fusecell.compiler.codegen.kernel_abi import SLOT_BYTES, TeamBlock
from fusecell.forks import in_forked_child

__all__ = ["backs_off", "run_team"]

_MAPS = Path("/proc/self/maps")
_RUNTIMES = ("libgomp", "libiomp5", "libomp")
_EMPTY = array("q", bytes(SLOT_BYTES * TeamBlock.slots()))


def run_team(address: int, args: int, threads: int, microseconds: float) -> None:
    """Call machine code once in each thread of a team, the caller's own among them; return when all are done.

    Arguments:
        address: of ``@team``, a C function of a :class:`TeamBlock`, which needs no lock of Python's.
        args: the address of the call's argument block.
        threads: how many are asked for. A forked child has one: the others are its parent's.
        microseconds: what the call would take on one thread, about.
    """
    if in_forked_child():
        threads = 1
    runtime = _openmp() if threads > 1 else None
    limits = tuning.TUNING
    arrival_us = min(max(microseconds, limits.least_arrival_us), limits.most_arrival_us)
    block = _EMPTY[:]
    block[TeamBlock.YIELD] = _yield()
    block[TeamBlock.RUNTIME_COUNT] = 0 if runtime is None else runtime.count
    block[TeamBlock.THREADS] = threads
    block[TeamBlock.ARGUMENTS] = args
    block[TeamBlock.ARRIVAL_BUDGET] = int(arrival_us * limits.spins_per_us)
    here = block.buffer_info()[0]
    began = time.perf_counter()
    if runtime is not None:
        runtime.parallel(address, here, threads, 0)
    else:
        call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
        helpers = [_pool(threads - 1).submit(call, here) for _ in range(threads - 1)]
        call(here)
        for helper in helpers:
            helper.result()
    now = time.perf_counter()
    late = block[TeamBlock.WORKED] < threads or block[TeamBlock.YIELDS] * limits.yields_every_us > (now - began) * 1e6
    _backoff.judge(now, late=late)


def backs_off() -> bool:
    """Whether a call should do without a team, because the last one had to wait for cores that others use."""
    return _backoff.until > time.perf_counter()


class _Backoff:
    """Until when calls do without a team: after two in a row that waited, for a while, twice as long each time."""

    def __init__(self) -> None:
        self.until, self._next, self._was_late = 0.0, tuning.TUNING.least_backoff_s, False

    def judge(self, now: float, *, late: bool) -> None:
        """Take note of a call that ended now."""
        if late and self._was_late:
            self.until, self._next = now + self._next, min(2 * self._next, tuning.TUNING.most_backoff_s)
        elif not late:
            self._next = tuning.TUNING.least_backoff_s
        self._was_late = late


_backoff = _Backoff()


@dataclass(frozen=True)
class _OpenMP:
    """The runtime that is loaded already: what runs a function in its team, and what tells how many do."""

    parallel: Callable[[int, int, int, int], None]
    count: int
    """The address of ``omp_get_num_threads``: a team may be smaller than it was asked for."""


@functools.cache
def _openmp() -> _OpenMP | None:
    """The runtime with GNU's entry that is loaded already; another of the same name would be another team."""
    if not _MAPS.exists():
        return None
    for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith(_RUNTIMES):
            library = ctypes.CDLL(path)
            parallel, count = (getattr(library, name, None) for name in ("GOMP_parallel", "omp_get_num_threads"))
            if parallel is not None and count is not None:
                parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
                parallel.restype = None
                return _OpenMP(parallel, _address(count))
    return None


@functools.cache
def _yield() -> int:
    """The address of what gives the core to another thread."""
    library: Any = ctypes.CDLL("kernel32") if sys.platform == "win32" else ctypes.CDLL(None)
    return _address(library.SwitchToThread if sys.platform == "win32" else library.sched_yield)


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fusecell")
