"""The team of threads that runs the parts of a call side by side: the OpenMP team that torch has already.

torch's operators leave their threads spinning for the next one. Threads of our own would have to share cores with them;
so where torch brings an OpenMP runtime with GNU's entry, as on Linux, parts run on that team. Elsewhere they run on
Python's threads, which kernels let go of the lock for.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["run_team"]

_MAPS = Path("/proc/self/maps")
_RUNTIMES = ("libgomp", "libiomp5", "libomp")
_parent = os.getpid()


def run_team(address: int, data: int, threads: int) -> None:
    """Call machine code once in each thread of a team, the caller's own among them; return when all are done.

    Arguments:
        address: of a C function that takes ``data``, shares the work out and needs no lock of Python's.
        threads: how many. A forked child has one: the team is its parent's.
    """
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
    if threads <= 1 or os.getpid() != _parent:
        call(data)
        return
    parallel = _parallel()
    if parallel is not None:
        parallel(address, data, threads, 0)
        return
    helpers = [_pool(threads - 1).submit(call, data) for _ in range(threads - 1)]
    call(data)
    for helper in helpers:
        helper.result()


@functools.cache
def _parallel() -> Callable[[int, int, int, int], None] | None:
    """``GOMP_parallel`` of the runtime that is loaded already; another of the same name would be another team."""
    if not _MAPS.exists():
        return None
    for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith(_RUNTIMES):
            found = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
            if found is not None:
                found.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
                found.restype = None
                parallel: Callable[[int, int, int, int], None] = found
                return parallel
    return None


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fusecell")
