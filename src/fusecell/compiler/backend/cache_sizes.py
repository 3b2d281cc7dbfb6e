"""The sizes of a core's data caches, as the operating system reports them."""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["USUAL", "CacheSizes", "cache_sizes"]

_CACHES = "/sys/devices/system/cpu/cpu0/cache"
_THREADS_OF_A_CORE = "/sys/devices/system/cpu/cpu0/topology/thread_siblings_list"
_L1, _L2 = 1, 2
_RELATION_CACHE = 2
_INSTRUCTION_CACHE = 1
_PROCESSOR_INFORMATION = struct.Struct("=QIxxxxBBHIIxxxx")
"""A ``SYSTEM_LOGICAL_PROCESSOR_INFORMATION`` of 64-bit Windows about a cache: the mask of processors that share it, the
relation, then level, associativity, bytes of a line, bytes of the cache and its type."""


class CacheSizes(NamedTuple):
    """A core's share of its data caches, in bytes.

    Of the third cache nothing is asked: where weights come from it, a chunk has 64 rows and more for each, and by
    reckoning so many need less of it than even main memory gives.
    """

    l1: int
    l2: int


USUAL = CacheSizes(32 << 10, 1 << 20)
"""The sizes where the system doesn't say, and of CPUs that aren't this machine's."""


@functools.cache
def cache_sizes() -> CacheSizes:
    """Return the sizes of this machine; the usual one of each cache of which the system says nothing."""
    reader = {"linux": _on_linux, "darwin": _on_macos, "win32": _on_windows}.get(sys.platform)
    if reader is None:
        return USUAL
    try:
        sizes = reader()
    except (OSError, ValueError, AttributeError):  # no such file, number or function
        return USUAL
    return CacheSizes(*(size or usual for size, usual in zip(sizes, USUAL, strict=True)))


def _on_linux() -> CacheSizes:
    """Read the files of the first processor. Cores may share a cache; the threads of a core count as one."""
    threads, shares = _processors(_THREADS_OF_A_CORE), {}
    for name in sorted(os.listdir(_CACHES)):
        cache = f"{_CACHES}/{name}"
        if name.startswith("index") and _text(f"{cache}/type") != "Instruction":
            cores = max(_processors(f"{cache}/shared_cpu_list") // threads, 1)
            shares[int(_text(f"{cache}/level"))] = (int(_text(f"{cache}/size").removesuffix("K")) << 10) // cores
    return CacheSizes(shares.get(_L1, 0), shares.get(_L2, 0))


def _processors(path: str) -> int:
    """Return how many processors a list such as ``0-3,8`` names; 1 where there is none."""
    try:
        ranges = [part.split("-") for part in _text(path).split(",")]
        return sum(int(part[-1]) - int(part[0]) + 1 for part in ranges)
    except (OSError, ValueError):
        return 1


def _text(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


def _on_macos(number: Callable[[str], int] | None = None) -> CacheSizes:
    """Ask for the caches of the fast cores, of which several share an L2; of an Intel Mac, for those there are.

    Arguments:
        number: returns the number of a name that the system knows, 0 for none; the system's own by default.
    """
    number = number or _sysctl
    l1, l2 = number("hw.perflevel0.l1dcachesize"), number("hw.perflevel0.l2cachesize")
    sharing = max(number("hw.perflevel0.cpusperl2"), 1)
    return CacheSizes(l1 or number("hw.l1dcachesize"), l2 // sharing if l2 else number("hw.l2cachesize"))


def _sysctl(name: str) -> int:
    value, size = ctypes.c_uint64(0), ctypes.c_size_t(8)
    failed = ctypes.CDLL(None).sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return 0 if failed else int(value.value)


def _on_windows(information: Callable[[], bytes] | None = None) -> CacheSizes:
    """Look through what the system says of its processors for the first cache of each level.

    Arguments:
        information: returns that, entry after entry; the system's own by default.
    """
    shares: dict[int, int] = {}
    for mask, relation, level, _, _, size, kind in _PROCESSOR_INFORMATION.iter_unpack(
        (information or _processor_information)()
    ):
        if relation == _RELATION_CACHE and kind != _INSTRUCTION_CACHE:
            sharing: int = mask.bit_count()
            # Two threads of a core count as one; for a cluster of cores without, too large a share is the better guess.
            shares.setdefault(level, int(size) // max(sharing // 2, 1))
    return CacheSizes(shares.get(_L1, 0), shares.get(_L2, 0))


def _processor_information() -> bytes:
    read = ctypes.CDLL("kernel32").GetLogicalProcessorInformation
    size = ctypes.c_ulong(0)
    read(None, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    return buffer.raw if read(buffer, ctypes.byref(size)) else b""
