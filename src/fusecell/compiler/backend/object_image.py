"""Link an object file to an image that only needs to be copied into memory: code, constants and tables in one piece.

An image is position-independent but for two lists: words that the address of the image is added to, as in tables of
functions, and words that get the address of a function of the C library. Only x86-64's ELF objects are linked, those
that LLVM writes of kernels; anything in one that this file doesn't know is an error, never ignored.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from fusecell.compiler.ir.sizes import ALIGNMENT, align_up
from fusecell.errors import CompilerError

__all__ = ["LIBRARY_FUNCTIONS", "Image", "image_of_object"]

LIBRARY_FUNCTIONS = ("memcpy", "memmove", "memset")
"""The functions of the C library that LLVM may call."""

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")
_X86_64, _RELOCATABLE = 62, 1
_PROGBITS, _SYMBOLS, _RELOCATIONS, _ZEROS, _RELOCATIONS_IMPLICIT = 1, 2, 4, 8, 9
_ALLOCATED = 2
_ABSOLUTE_64, _RELATIVE_32, _CALL_32 = 1, 2, 4
_WORD = 8
_JUMP = struct.Struct("<2si")  # jmp [rip + offset]


@dataclass(frozen=True)
class Image:
    """Linked code.

    Attributes:
        data: the bytes.
        entry: the offset of the function.
        rebased: offsets of 64-bit words to which the image's address is added.
        imported: by the name of a function of the C library, the offset of the word that gets its address.
    """

    data: bytes
    entry: int
    rebased: tuple[int, ...]
    imported: dict[str, int]


class _Section(NamedTuple):
    kind: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int


class _Symbol(NamedTuple):
    name: str
    section: int
    value: int


def image_of_object(code: bytes, entry: str) -> Image:
    """Link an object.

    Arguments:
        code: an ELF object for x86-64, position-independent.
        entry: the function to call.

    Raises:
        CompilerError: for any other object, or one that needs more than an image can have.
    """
    try:
        return _Linker(code).link(entry)
    except (struct.error, IndexError, ValueError) as error:
        raise CompilerError(f"an object file ends too early to be linked ({error})") from error


class _Linker:
    def __init__(self, code: bytes) -> None:
        self._code = code
        magic, kind, machine, *_, sections_at, _, _, _, _, _, count, _ = _HEADER.unpack_from(code)
        if magic[:6] != b"\x7fELF\x02\x01" or (kind, machine) != (_RELOCATABLE, _X86_64):
            raise CompilerError("only ELF objects for x86-64 are linked to an image")
        self._sections = [self._section(sections_at + index * _SECTION.size) for index in range(count)]
        self._symbols = list(self._read_symbols())
        self._places: dict[int, int] = {}
        self._image = bytearray()
        self._rebased: list[int] = []
        self._jumps: dict[str, int] = {}
        self._imported: dict[str, int] = {}

    def link(self, entry: str) -> Image:
        for index, section in enumerate(self._sections):
            if section.flags & _ALLOCATED:
                self._place(index, section)
        for section in self._sections:
            if section.info in self._places and section.kind == _RELOCATIONS_IMPLICIT:
                raise CompilerError("an object file has relocations without addends, expected none on x86-64")
            if section.kind == _RELOCATIONS and section.info in self._places:
                for at in range(section.offset, section.offset + section.size, _RELOCATION.size):
                    self._relocate(self._places[section.info], *_RELOCATION.unpack_from(self._code, at))
        found = [self._address(symbol) for symbol in self._symbols if symbol.name == entry and symbol.section]
        if len(found) != 1:
            raise CompilerError(f"an object file should define {entry!r}")
        return Image(bytes(self._image), found[0], tuple(sorted(self._rebased)), self._imported)

    def _section(self, at: int) -> _Section:
        _, kind, flags, _, offset, size, link, info, alignment, _ = _SECTION.unpack_from(self._code, at)
        return _Section(kind, flags, offset, size, link, info, alignment)

    def _read_symbols(self) -> Iterator[_Symbol]:
        for table in self._sections:
            if table.kind == _SYMBOLS:
                names = self._sections[table.link]
                for at in range(table.offset, table.offset + table.size, _SYMBOL.size):
                    name, _, _, section, value, _ = _SYMBOL.unpack_from(self._code, at)
                    start = names.offset + name
                    yield _Symbol(self._code[start : self._code.index(b"\0", start)].decode(), section, value)

    def _grow(self, alignment: int) -> int:
        """Fill up to a multiple; return the place."""
        if alignment > ALIGNMENT:
            raise CompilerError(f"a section is aligned to {alignment} bytes, expected {ALIGNMENT} at the most")
        place = align_up(len(self._image), max(alignment, 1))
        self._image += bytes(place - len(self._image))
        return place

    def _place(self, index: int, section: _Section) -> None:
        # Unwind tables and others have types of their own; kernels, which throw nothing, have none.
        if section.kind not in (_PROGBITS, _ZEROS):
            raise CompilerError(f"a section of type {section.kind:#x} can't be part of an image")
        self._places[index] = self._grow(section.alignment)
        zeros = section.kind == _ZEROS
        self._image += bytes(section.size) if zeros else self._code[section.offset : section.offset + section.size]

    def _address(self, symbol: _Symbol) -> int:
        if symbol.section not in self._places:
            raise CompilerError(f"the symbol {symbol.name!r} lies in no section of the image")
        return self._places[symbol.section] + symbol.value

    def _relocate(self, place: int, offset: int, info: int, addend: int) -> None:
        symbol, kind, at = self._symbols[info >> 32], info & 0xFFFFFFFF, place + offset
        address = self._address(symbol) if symbol.section else self._jump(symbol.name)
        if kind == _ABSOLUTE_64:
            struct.pack_into("<Q", self._image, at, address + addend)
            self._rebased.append(at)
        elif kind in (_RELATIVE_32, _CALL_32):
            struct.pack_into("<i", self._image, at, address + addend - at)
        else:
            raise CompilerError(f"a relocation of type {kind} can't be part of an image")

    def _jump(self, name: str) -> int:
        """Return the place of code that jumps to a function of the C library."""
        if name not in LIBRARY_FUNCTIONS:
            raise CompilerError(f"a kernel calls {name!r}, expected no function but {', '.join(LIBRARY_FUNCTIONS)}")
        if name not in self._jumps:
            self._imported[name] = word = self._grow(_WORD)
            self._image += bytes(_WORD)
            self._jumps[name] = jump = self._grow(_WORD)
            self._image += _JUMP.pack(b"\xff\x25", word - (jump + _JUMP.size))
        return self._jumps[name]
