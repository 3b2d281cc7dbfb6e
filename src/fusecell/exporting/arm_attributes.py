"""The build attribute by which ARM's linkers know how functions take floating-point arguments.

LLVM writes it only if it is told the calling convention by an option that isn't at hand. An artefact's functions take
and return none, so they are fit for both conventions, which is a value of the attribute (ABI for the Arm Architecture,
addenda, "Tag_ABI_VFP_args"); without it a linker refuses to join the object with others.
"""

from __future__ import annotations

import struct

from fusecell.errors import CompilerError

__all__ = ["for_both_conventions"]

_ATTRIBUTES = 0x70000003
_TAG_ABI_VFP_ARGS, _BOTH = 28, 3
_HEADER = len(b"A")
_VENDOR = b"aeabi\0"


def for_both_conventions(code: bytes) -> bytes:
    """Return a 32-bit ELF object with the attribute.

    Raises:
        CompilerError: if it has no build attributes of the usual form.
    """
    (sections_at,) = struct.unpack_from("<I", code, 32)
    size, count = struct.unpack_from("<HH", code, 46)
    for index in range(count):
        at = sections_at + index * size
        _, kind, _, _, offset, length = struct.unpack_from("<6I", code, at)
        if kind == _ATTRIBUTES:
            attributes = _with_attribute(code[offset : offset + length])
            # The longer section goes to the end of the file.
            out = bytearray(code)
            struct.pack_into("<II", out, at + 16, len(code), len(attributes))
            return bytes(out) + attributes
    raise CompilerError("an object file for ARM has no build attributes")


def _with_attribute(section: bytes) -> bytes:
    """Append the attribute to those of the whole file, which are the only ones: version, vendor, tag, attributes."""
    (length,) = struct.unpack_from("<I", section, _HEADER)
    file_at = _HEADER + 4 + len(_VENDOR)
    tag, file_length = struct.unpack_from("<BI", section, file_at)
    whole = section.startswith(b"A") and _HEADER + length == len(section) == file_at + file_length
    if not whole or section[5:file_at] != _VENDOR or tag != 1:
        raise CompilerError("an object file for ARM has build attributes of another form than expected")
    added = bytes([_TAG_ABI_VFP_ARGS, _BOTH])
    return b"".join(
        [
            b"A",
            struct.pack("<I", length + len(added)),
            _VENDOR,
            struct.pack("<BI", tag, file_length + len(added)),
            section[file_at + 5 :],
            added,
        ]
    )
