"""The threads that run a call together: the OpenMP team that torch has already.

torch's operators leave their threads spinning for the next one. Threads of our own would have to share cores with them;
so where torch brings an OpenMP runtime with GNU's entry, as on Linux, a crew is of that team. Elsewhere it is of
Python's threads, which kernels let go of the lock for.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import time
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["crew_waits", "run_crew"]

_MAPS = Path("/proc/self/maps")
_RUNTIMES = ("libgomp", "libiomp5", "libomp")
_parent = os.getpid()
# A crew's data, as ``emit.crew`` lays it out: so many words, from one on what it is given, from another what it found.
_WORDS, _GIVEN, _FOUND = 16, 9, 14
# How long the first of a crew waits for the others, in microseconds: what the call takes alone, within bounds. Waking
# takes some fifty, after a pause several hundred. And the turns in a microsecond, of which CPUs make seven to thirty.
_LEAST_PATIENCE, _MOST_PATIENCE, _TURNS = 50, 2000, 20
# In so many microseconds a thread may give its core away once, having waited for some ten, or the call counts as late;
# and the seconds without a crew that follow.
_GIVES_WAY = 50
_LEAST_ASIDE, _MOST_ASIDE = 0.005, 0.5


def run_crew(address: int, args: int, threads: int, microseconds: float) -> None:
    """Call machine code once in each thread of a crew, the caller's own among them; return when all are done.

    Arguments:
        address: of ``@crew``, a C function of the data laid out below, which needs no lock of Python's.
        args: the address of the call's argument block.
        threads: how many are asked for. A forked child has one: the others are its parent's.
        microseconds: what the call would take on one thread, about.
    """
    if os.getpid() != _parent:
        threads = 1
    runtime = _openmp() if threads > 1 else None
    data = array("q", bytes(8 * _WORDS))
    patience = int(min(max(microseconds, _LEAST_PATIENCE), _MOST_PATIENCE) * _TURNS)
    count = 0 if runtime is None else runtime.count
    data[_GIVEN : _GIVEN + 5] = array("q", [_yield(), count, threads, args, patience])
    here = data.buffer_info()[0]
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
    worked, gave_way = data[_FOUND], data[_FOUND + 1]
    _aside.judge(now, late=worked < threads or gave_way * _GIVES_WAY > (now - began) * 1e6)


def crew_waits() -> bool:
    """Whether a call should do without a crew, because the last one had to wait for cores that others use."""
    return _aside.until > time.perf_counter()


class _Backoff:
    """Until when calls do without a crew: after two in a row that waited, for a while, twice as long each time."""

    def __init__(self) -> None:
        self.until, self._next, self._was_late = 0.0, _LEAST_ASIDE, False

    def judge(self, now: float, *, late: bool) -> None:
        """Take note of a call that ended now."""
        if late and self._was_late:
            self.until, self._next = now + self._next, min(2 * self._next, _MOST_ASIDE)
        elif not late:
            self._next = _LEAST_ASIDE
        self._was_late = late


_aside = _Backoff()


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
