"""What a report says of an object file: the bytes of its sections, and the symbols that it needs from elsewhere.

Read in the file itself, in each of the four formats, as no tool for foreign ones may be at hand.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from fusecell.errors import CompilerError

__all__ = ["ObjectFile", "leb128", "read_object", "wasm_sections"]


@dataclass(frozen=True)
class ObjectFile:
    """Contents of an object file.

    Attributes:
        loaded: bytes of code and constants, all that is in memory when it runs.
        undefined: the symbols that it needs from elsewhere, sorted.
    """

    loaded: int
    undefined: tuple[str, ...]


def read_object(code: bytes) -> ObjectFile:
    """Read an object file in ELF, COFF, Mach-O or WebAssembly.

    Raises:
        CompilerError: for another format.
    """
    if code.startswith(b"\x7fELF"):
        return _elf(code)
    if code.startswith(b"\xcf\xfa\xed\xfe"):
        return _mach_o(code)
    if code.startswith(b"\0asm"):
        return _wasm(code)
    if code.startswith(b"\x64\x86"):
        return _coff(code)
    raise CompilerError(f"an object file begins with {code[:4].hex()}, which is no format that reports know")


def _text(code: bytes, at: int) -> str:
    return code[at : code.index(b"\0", at)].decode()


_ALLOCATED, _SYMBOLS, _GLOBAL = 2, 2, 1


def _elf(code: bytes) -> ObjectFile:
    wide = code[4] == 2
    (sections_at,) = struct.unpack_from("<Q" if wide else "<I", code, 40 if wide else 32)
    size, count = struct.unpack_from("<HH", code, 58 if wide else 46)
    # type, flags, offset, size, link
    layout, fields = ("<IIQQQQII", (1, 2, 4, 5, 6)) if wide else ("<IIIIIIII", (1, 2, 4, 5, 6))
    sections = []
    for index in range(count):
        values = struct.unpack_from(layout, code, sections_at + index * size)
        sections.append([values[field] for field in fields])
    loaded = sum(length for kind, flags, _, length, _ in sections if flags & _ALLOCATED)
    undefined = []
    for kind, _, offset, length, link in sections:
        if kind != _SYMBOLS:
            continue
        names = sections[link][2]
        entry = 24 if wide else 16
        for at in range(offset + entry, offset + length, entry):
            name, info, section = (
                struct.unpack_from("<IBxH", code, at) if wide else struct.unpack_from("<I8xBxH", code, at)
            )
            if section == 0 and info >> 4 >= _GLOBAL:
                undefined.append(_text(code, names + name))
    return ObjectFile(loaded, tuple(sorted(undefined)))


_EXTERNAL, _CONTENT = 2, 0x60


def _coff(code: bytes) -> ObjectFile:
    sections, symbols_at, symbols, optional = struct.unpack_from("<2xH4xIIH", code, 0)
    loaded = 0
    for index in range(sections):
        name, length, characteristics = struct.unpack_from("<8s8xI16xI", code, 20 + optional + 40 * index)
        if characteristics & _CONTENT and not name.startswith((b".debug", b".llvm", b".drectve")):
            loaded += length
    undefined, strings, index = [], symbols_at + 18 * symbols, 0
    while index < symbols:
        at = symbols_at + 18 * index
        short, value, section, storage, auxiliary = struct.unpack_from("<8sIhxxBB", code, at)
        if section == 0 and storage == _EXTERNAL and value == 0:
            offset = struct.unpack("<II", short)[1]
            undefined.append(
                short.rstrip(b"\0").decode() if not short.startswith(b"\0\0\0\0") else _text(code, strings + offset)
            )
        index += 1 + auxiliary
    return ObjectFile(loaded, tuple(sorted(undefined)))


_SEGMENT, _SYMBOL_TABLE = 0x19, 2


def _mach_o(code: bytes) -> ObjectFile:
    (commands,) = struct.unpack_from("<I", code, 16)
    at, loaded, undefined = 32, 0, []
    for _ in range(commands):
        kind, length = struct.unpack_from("<II", code, at)
        if kind == _SEGMENT:
            (count,) = struct.unpack_from("<I", code, at + 64)
            loaded += sum(struct.unpack_from("<Q", code, at + 72 + 80 * index + 40)[0] for index in range(count))
        elif kind == _SYMBOL_TABLE:
            symbols_at, count, strings = struct.unpack_from("<III", code, at + 8)
            for index in range(count):
                name, flags, section = struct.unpack_from("<IBB", code, symbols_at + 16 * index)
                if flags & 1 and not flags & 0x0E and section == 0:
                    undefined.append(_text(code, strings + name).removeprefix("_"))
        at += length
    return ObjectFile(loaded, tuple(sorted(undefined)))


def leb128(code: bytes, at: int) -> tuple[int, int]:
    """Read an unsigned number of WebAssembly; return it, and where the next begins."""
    value = shift = 0
    while True:
        byte = code[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at


def wasm_sections(code: bytes) -> Iterator[tuple[int, bytes]]:
    """Iterate over the sections of a WebAssembly module: the number of its kind, and its contents."""
    at = 8
    while at < len(code):
        kind = code[at]
        length, at = leb128(code, at + 1)
        yield kind, code[at : at + length]
        at += length


_IMPORTS, _CODE, _DATA, _FUNCTION = 2, 10, 11, 0


def _wasm(code: bytes) -> ObjectFile:
    loaded, undefined = 0, []
    for kind, contents in wasm_sections(code):
        if kind in (_CODE, _DATA):
            loaded += len(contents)
        elif kind == _IMPORTS:
            undefined = [name for name, what, _ in wasm_imports(contents) if what == _FUNCTION]
    return ObjectFile(loaded, tuple(sorted(undefined)))


def wasm_imports(contents: bytes) -> Iterator[tuple[str, int, bytes]]:
    """Iterate over the entries of an import section: name, kind, and the bytes of the type."""
    count, at = leb128(contents, 0)
    for _ in range(count):
        length, at = leb128(contents, at)
        length, at = leb128(contents, at + length)
        name, at = contents[at : at + length].decode(), at + length
        what, start = contents[at], at + 1
        if what == _FUNCTION:
            _, at = leb128(contents, start)
        elif what == 3:  # a global: its type, and whether it changes
            at = start + 2
        else:  # a table has a type before its limits, a memory has none
            at = start + (what == 1)
            has_most, at = leb128(contents, at)
            for _ in range(1 + (has_most & 1)):
                _, at = leb128(contents, at)
        yield name, what, contents[start:at]
