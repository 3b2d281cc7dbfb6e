"""Map the machine code of an image into memory and call it: without LLVM, by the operating system alone."""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Mapping, Sequence

__all__ = ["MappedCode"]


class MappedCode:
    """Code in memory that nothing can write to, mapped for as long as the process lives or this object does.

    Arguments:
        image: the bytes.
        entry: the offset of the function.
        rebased: offsets of 64-bit words, offsets themselves, to which the image's address is added.
        imported: by the name of a function of the C library, the offset of the word that gets its address.

    Attributes:
        address: of the function.

    Raises:
        PermissionError: if the system doesn't let a process execute memory that it has written.
    """

    def __init__(self, image: bytes, entry: int, rebased: Sequence[int], imported: Mapping[str, int]) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        self._memory = mmap.mmap(-1, len(image), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # An export of the memory: while it exists, the memory can't be unmapped.
        self._first = ctypes.c_char.from_buffer(self._memory)
        base = ctypes.addressof(self._first)
        self._memory[:] = image
        for at in rebased:
            (offset,) = struct.unpack_from("<Q", image, at)
            struct.pack_into("<Q", self._memory, at, base + offset)
        for name, at in imported.items():
            address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
            struct.pack_into("<Q", self._memory, at, address)
        protect = library.mprotect
        protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        # Never writable and executable at once.
        if protect(base, len(image), mmap.PROT_READ | mmap.PROT_EXEC):
            raise PermissionError(
                ctypes.get_errno(),
                "The system lets no process execute memory that it has written, so machine code can't be loaded",
            )
        self.address = base + entry
