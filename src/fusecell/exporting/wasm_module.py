"""A WebAssembly module from an object file, without a linker.

An object file is a module already: LLVM writes addresses and indices as they are if nothing else is linked and memory
begins with its data. What it lacks are definitions of what it imports for a linker's sake, its memory and its stack
pointer, and its exports, whose names are in its symbol table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fusecell.errors import CompilerError
from fusecell.exporting.object_file import leb128, wasm_imports, wasm_sections

__all__ = ["IMPORTED", "STACK_BYTES", "wasm_module"]

STACK_BYTES = 1 << 16
IMPORTED = frozenset({"sin", "cos", "pow"})
"""Functions that a module may import: JavaScript's Math has them."""
_PAGE = 1 << 16
_CUSTOM, _IMPORT, _FUNCTION, _TABLE, _MEMORY, _GLOBAL, _EXPORT, _DATA = 0, 2, 3, 4, 5, 6, 7, 11
# The order of sections in a module; the count of data segments comes before the code.
_ORDER = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 10, 11)
_SYMBOL_TABLE = 8
_UNDEFINED, _EXPLICIT_NAME = 0x10, 0x40
_I32, _MUTABLE = b"\x7f", b"\x01"


@dataclass
class _Reader:
    """Reader of the numbers and names of a section."""

    data: bytes
    at: int = 0

    def number(self) -> int:
        value, self.at = leb128(self.data, self.at)
        return value

    def bytes(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count : self.at]

    def name(self) -> str:
        return self.bytes(self.number()).decode()


def wasm_module(code: bytes, names: Sequence[str], free_bytes: int) -> bytes:
    """Make a module that exports functions, its memory, and ``heap_base``, the address of free memory.

    What it imports, if anything, are functions of JavaScript's Math, as ``env``.

    Arguments:
        code: the object file.
        names: the functions to export.
        free_bytes: free memory to begin with, from ``heap_base`` on.

    Raises:
        CompilerError: if it needs a function that JavaScript doesn't have.
    """
    sections = {kind: contents for kind, contents in wasm_sections(code) if kind != _CUSTOM}
    symbols = _function_symbols(code)
    imports = list(wasm_imports(sections.pop(_IMPORT, b"\0")))
    functions = [(name, contents) for name, what, contents in imports if what == 0]
    missing = sorted({name for name, _ in functions} - IMPORTED)
    if missing:
        raise CompilerError(
            f"a web page has no {', '.join(missing)}, which the step calls: export an object file instead"
        )
    if functions:  # first among the functions, as they were
        entries = [_name("env") + _name(name) + b"\x00" + contents for name, contents in functions]
        sections[_IMPORT] = _leb(len(entries)) + b"".join(entries)
    for name, what, contents in imports:
        if what == 1:  # the table of functions that are called by their address; entry 0 is the null address
            count, _ = leb128(sections[_FUNCTION], 0)
            sections[_TABLE] = b"\x01" + contents[:1] + b"\x00" + _leb(1 + count)
        elif what == 3 and name != "__stack_pointer":
            raise CompilerError(f"an object file imports {name}, which is not known here")
    stack_top = (_data_end(sections.get(_DATA, b"\0")) + STACK_BYTES + 63) & -64
    sections[_MEMORY] = b"\x01\x00" + _leb(-(-(stack_top + free_bytes) // _PAGE))
    # Global 0 is the stack pointer, as which it was imported; it grows downwards.
    initial = b"\x41" + _signed_leb(stack_top) + b"\x0b"
    sections[_GLOBAL] = b"\x02" + _I32 + _MUTABLE + initial + _I32 + b"\x00" + initial
    exports = [_name("memory") + b"\x02\x00", _name("heap_base") + b"\x03\x01"]
    exports += [_name(name) + b"\x00" + _leb(symbols[name]) for name in names]
    sections[_EXPORT] = _leb(len(exports)) + b"".join(exports)
    parts = [bytes([kind]) + _leb(len(sections[kind])) + sections[kind] for kind in _ORDER if kind in sections]
    return b"\0asm\x01\0\0\0" + b"".join(parts)


def _function_symbols(code: bytes) -> dict[str, int]:
    """Return the index of each defined function by its name."""
    for kind, contents in wasm_sections(code):
        reader = _Reader(contents)
        if kind != _CUSTOM or reader.name() != "linking":
            continue
        reader.number()  # the version
        while reader.at < len(contents):
            subsection, length = reader.number(), reader.number()
            body = _Reader(reader.bytes(length))
            if subsection == _SYMBOL_TABLE:
                return _functions(body)
    raise CompilerError("an object file has no symbol table")


def _functions(reader: _Reader) -> dict[str, int]:
    functions = {}
    for _ in range(reader.number()):
        kind, flags = reader.number(), reader.number()
        if kind == 1:  # data: a name, and where it is unless it is defined elsewhere
            reader.name()
            if not flags & _UNDEFINED:
                for _ in range(3):
                    reader.number()
        elif kind == 3:  # a section
            reader.number()
        else:  # a function, global or table
            index = reader.number()
            if not flags & _UNDEFINED or flags & _EXPLICIT_NAME:
                name = reader.name()
                if kind == 0 and not flags & _UNDEFINED:
                    functions[name] = index
    return functions


def _data_end(contents: bytes) -> int:
    """Return the address behind the last data segment."""
    reader, end = _Reader(contents), 0
    for _ in range(reader.number()):
        if reader.number() != 0 or reader.bytes(1) != b"\x41":
            raise CompilerError("an object file has a data segment of a kind that is not known here")
        at = _signed(reader)
        reader.bytes(1)
        end = max(end, at + len(reader.bytes(reader.number())))
    return end


def _signed(reader: _Reader) -> int:
    value = shift = 0
    while True:
        (byte,) = reader.bytes(1)
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return value - (1 << shift) if byte & 0x40 else value


def _leb(value: int) -> bytes:
    out = bytearray()
    while True:
        byte, value = value & 0x7F, value >> 7
        out.append(byte | (0x80 if value else 0))
        if not value:
            return bytes(out)


def _signed_leb(value: int) -> bytes:
    out = bytearray()
    while True:
        byte, value = value & 0x7F, value >> 7
        done = (value == 0 and not byte & 0x40) or (value == -1 and byte & 0x40)
        out.append(byte | (0 if done else 0x80))
        if done:
            return bytes(out)


def _name(text: str) -> bytes:
    return _leb(len(text)) + text.encode()
