"""The size of a core's second-level cache, as the operating system reports it."""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys
from collections.abc import Callable

__all__ = ["l2_bytes"]

_CACHES = "/sys/devices/system/cpu/cpu0/cache"
_USUAL_L2 = 1 << 20
_L2 = 2
_RELATION_CACHE = 2
_PROCESSOR_INFORMATION = struct.Struct("=QIxxxxBBHII4x")
"""A ``SYSTEM_LOGICAL_PROCESSOR_INFORMATION`` of 64-bit Windows about a cache: the mask of processors that share it, the
relation, then level, associativity, bytes of a line, bytes of the cache and its type."""


@functools.cache
def l2_bytes() -> int:
    """Return a core's share of L2 in bytes; a megabyte where the system doesn't say."""
    readers = {"linux": _on_linux, "darwin": _on_macos, "win32": _on_windows}
    reader = readers.get(sys.platform)
    if reader is None:
        return _USUAL_L2
    try:
        return reader() or _USUAL_L2
    except (OSError, ValueError, AttributeError):  # no such file, number or function
        return _USUAL_L2


def _on_linux() -> int:
    """Read the files of the first processor."""
    for name in sorted(os.listdir(_CACHES)):
        cache = f"{_CACHES}/{name}"
        if name.startswith("index") and _text(f"{cache}/level") == str(_L2):
            return int(_text(f"{cache}/size").removesuffix("K")) << 10
    return 0


def _text(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


def _on_macos(number: Callable[[str], int] | None = None) -> int:
    """Ask for the L2 of a cluster of fast cores and how many share it; of an Intel Mac, for the one there is.

    Arguments:
        number: returns the number of a name that the system knows, 0 for none; the system's own by default.
    """
    number = number or _sysctl
    size = number("hw.perflevel0.l2cachesize")
    return size // max(number("hw.perflevel0.cpusperl2"), 1) if size else number("hw.l2cachesize")


def _sysctl(name: str) -> int:
    value, size = ctypes.c_uint64(0), ctypes.c_size_t(8)
    failed = ctypes.CDLL(None).sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return 0 if failed else int(value.value)


def _on_windows(information: Callable[[], bytes] | None = None) -> int:
    """Look through what the system says of its processors for the first L2.

    Arguments:
        information: returns that, entry after entry; the system's own by default.
    """
    data = (information or _processor_information)()
    for mask, relation, level, _, _, size, _ in _PROCESSOR_INFORMATION.iter_unpack(data):
        if relation == _RELATION_CACHE and level == _L2:
            sharing: int = mask.bit_count()
            # Two threads of a core count as one; for a cluster of cores without, too large a share is the better guess.
            return int(size) // max(sharing // 2, 1)
    return 0


def _processor_information() -> bytes:
    read = ctypes.CDLL("kernel32").GetLogicalProcessorInformation
    size = ctypes.c_ulong(0)
    read(None, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    return buffer.raw if read(buffer, ctypes.byref(size)) else b""
