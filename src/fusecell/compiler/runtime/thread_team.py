"""Thread teams: run a kernel on the threads of torch's OpenMP runtime, or else on Python's.

How many threads a call gets is decided in `programs.team_size`.

After an operator of torch, OpenMP's threads keep spinning for the next one (GOMP_SPINCOUNT, KMP_BLOCKTIME), and other
threads would have to share cores with them. So where torch has loaded an OpenMP runtime with GNU's entry point, as on
Linux, a team is made of its threads. Elsewhere it is made of Python threads, and the kernel runs without the GIL.
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

import numpy as np
import numpy.typing as npt

from fusecell.compiler.backend import tuning
from fusecell.compiler.backend.jit import Loaded, load
from fusecell.compiler.backend.target import host_target
from fusecell.compiler.codegen.kernel_abi import SLOT_BYTES, TeamBlock
from fusecell.forks import in_forked_child

__all__ = ["backs_off", "run_each", "run_team"]

_MAPS = Path("/proc/self/maps")
_RUNTIMES = ("libgomp", "libiomp5", "libomp")
_EMPTY = array("q", bytes(SLOT_BYTES * TeamBlock.slots()))


def run_team(address: int, args: int, threads: int, microseconds: float) -> None:
    """Call machine code once in each thread of a team, including the calling one; return when all are done.

    Arguments:
        address: of ``@team``, a C function of a :class:`TeamBlock`.
        args: the address of the call's argument block.
        threads: the size of the team; a runtime may start fewer.
        microseconds: an estimate of the call on one thread.
    """
    if in_forked_child():  # which has none of its parent's threads: OpenMP would wait for them for ever
        threads = 1
    runtime = _openmp() if threads > 1 else None
    limits = tuning.TUNING
    # The leader waits for the others about as long as it would take to do their work as well.
    arrival_us = min(max(microseconds, limits.least_arrival_us), limits.most_arrival_us)
    block = _EMPTY[:]
    block[TeamBlock.YIELD] = _yield()
    block[TeamBlock.RUNTIME_COUNT] = 0 if runtime is None else runtime.count
    block[TeamBlock.THREADS] = threads
    block[TeamBlock.ARGUMENTS] = args
    block[TeamBlock.ARRIVAL_BUDGET] = int(arrival_us * limits.spins_per_us)
    block_address = block.buffer_info()[0]
    began = time.perf_counter()
    if runtime is not None:
        runtime.parallel(address, block_address, threads, 0)
    else:
        call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
        helpers = [_pool(threads - 1).submit(call, block_address) for _ in range(threads - 1)]
        call(block_address)
        for helper in helpers:
            helper.result()
    now = time.perf_counter()
    # A team that starts short of threads, or yields all the time, shares its cores with somebody.
    late = block[TeamBlock.WORKED] < threads or block[TeamBlock.YIELDS] * limits.yields_every_us > (now - began) * 1e6
    _backoff.judge(now, late=late)


def run_each(address: int, blocks: npt.NDArray[np.int64], threads: int, scratch: int, scratch_bytes: int) -> None:
    """Call machine code once for each of several argument blocks, each time in one thread of a team.

    Arguments:
        address: of a kernel's ``@run``.
        blocks: one in each row; each has the address of the first thread's scratch memory.
        threads: the size of the team; one that there is no OpenMP runtime for is this thread alone.
        scratch: the slot of a block that has it.
        scratch_bytes: how far apart the threads' scratch memory is.
    """
    runtime = None if in_forked_child() or threads == 1 else _openmp()
    first, size = blocks.ctypes.data, blocks.strides[0]
    if runtime is None:
        call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
        for place in range(len(blocks)):
            call(first + place * size)
        return
    shared = array("q", [address, len(blocks), first, size, scratch, scratch_bytes, *[0] * 10])
    runtime.parallel(_each().address("each"), shared.buffer_info()[0], threads, 0)


@functools.cache
def _each() -> Loaded:
    """Compile what each thread of :func:`run_each` runs: the next block that none has taken, until all are.

    The first thing that a thread takes is a number of its own, which says where its scratch memory is.
    """
    return load(
        """
define void @each(ptr %shared) {
entry:
  %kernel = load ptr, ptr %shared
  %count.ptr = getelementptr i64, ptr %shared, i64 1
  %count = load i64, ptr %count.ptr
  %blocks.ptr = getelementptr i64, ptr %shared, i64 2
  %blocks = load ptr, ptr %blocks.ptr
  %size.ptr = getelementptr i64, ptr %shared, i64 3
  %size = load i64, ptr %size.ptr
  %scratch.ptr = getelementptr i64, ptr %shared, i64 4
  %scratch = load i64, ptr %scratch.ptr
  %scratch.bytes.ptr = getelementptr i64, ptr %shared, i64 5
  %scratch.bytes = load i64, ptr %scratch.bytes.ptr
  ; in another cache line than what all threads read
  %next.ptr = getelementptr i64, ptr %shared, i64 12
  %threads.ptr = getelementptr i64, ptr %shared, i64 13
  %thread = atomicrmw add ptr %threads.ptr, i64 1 seq_cst
  %distance = mul i64 %thread, %scratch.bytes
  br label %take
take:
  %index = atomicrmw add ptr %next.ptr, i64 1 seq_cst
  %left = icmp ult i64 %index, %count
  br i1 %left, label %run, label %done
run:
  %offset = mul i64 %index, %size
  %block = getelementptr i8, ptr %blocks, i64 %offset
  %own.ptr = getelementptr i64, ptr %block, i64 %scratch
  %of.first = load i64, ptr %own.ptr
  %own = add i64 %of.first, %distance
  store i64 %own, ptr %own.ptr
  call void %kernel(ptr %block)
  br label %take
done:
  ret void
}
""",
        ["each"],
        host_target(),
    )


def backs_off() -> bool:
    """Whether calls are to run on one thread for a while, because the last ones had to wait for busy cores."""
    return _backoff.until > time.perf_counter()


class _Backoff:
    """Exponential backoff: no team for a while after two late calls in a row, twice as long each time.

    A team that shares its cores with other processes waits at every barrier for the thread that has none, and is many
    times slower than one thread.
    """

    def __init__(self) -> None:
        self.until, self._next, self._was_late = 0.0, tuning.TUNING.least_backoff_s, False

    def judge(self, now: float, *, late: bool) -> None:
        """Record a call that ended now, and start or reset the backoff."""
        if late and self._was_late:
            self.until, self._next = now + self._next, min(2 * self._next, tuning.TUNING.most_backoff_s)
        elif not late:
            self._next = tuning.TUNING.least_backoff_s
        self._was_late = late


_backoff = _Backoff()


@dataclass(frozen=True)
class _OpenMP:
    """An OpenMP runtime.

    Arguments:
        parallel: ``GOMP_parallel(function, argument, threads, flags)``: run a function in a team.
        count: the address of ``omp_get_num_threads``: a team may be smaller than it was asked to be.
    """

    parallel: Callable[[int, int, int, int], None]
    count: int


@functools.cache
def _openmp() -> _OpenMP | None:
    """Find the runtime that torch has loaded, by its path: a second copy would have threads of its own."""
    if not _MAPS.exists():
        return None
    # By path: torch's wheels have a libgomp of their own, for whose name the system's might be loaded as well.
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
    """Return the address of the system's function that lets another thread have the core."""
    library: Any = ctypes.CDLL("kernel32") if sys.platform == "win32" else ctypes.CDLL(None)
    return _address(library.SwitchToThread if sys.platform == "win32" else library.sched_yield)


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fusecell")
