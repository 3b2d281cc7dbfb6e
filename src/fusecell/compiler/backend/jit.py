"""JIT loader: LLVM text to callable addresses, through the disk cache of object code."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from fusecell.compiler.backend import llvm
from fusecell.compiler.backend.disk_cache import cache_key, read_entry, write_entry
from fusecell.compiler.backend.target import Target
from fusecell.errors import CompilerError

__all__ = ["Loaded", "load"]


class Loaded:
    """Machine code in this process, mapped as long as this object is alive.

    Attributes:
        llvm: the text it was made of.
        target: the CPU it was made for.
        effort: LLVM's optimisation level.
        from_cache: whether its object code was read from disk.
        object_size: bytes of object code.
    """

    def __init__(
        self,
        text: str,
        target: Target,
        library: llvm.Library,
        *,
        effort: int,
        from_cache: bool,
        object_size: int,
    ) -> None:
        self.llvm = text
        self.target = target
        self.effort = effort
        self.from_cache = from_cache
        self.object_size = object_size

        self._library = library

    def address(self, name: str) -> int:
        """Return the address of an exported function."""
        try:
            return self._library.addresses[name]
        except KeyError:
            exported = ", ".join(sorted(self._library.addresses))
            raise KeyError(f"{name!r} was not exported; exported are: {exported}") from None

    def assembly(self) -> str:
        """Return the machine code as assembly, compiled anew from the text."""
        target = self.target
        names = tuple(self._library.addresses)
        return llvm.assembly(self.llvm, names, target.cpu, target.features, target.triple, self.effort)


# Weak: code is unmapped with the last program that uses it, and linked again, from disk, in less than a millisecond.
_live: weakref.WeakValueDictionary[tuple[str, Target, frozenset[str], int], Loaded] = weakref.WeakValueDictionary()


def load(text: str, names: Sequence[str], target: Target) -> Loaded:
    """Compile LLVM text, or read its object code from the disk cache, and link it into the process.

    The same text for the same target is compiled once, whichever thread asks first, and linked once while the result
    is alive.

    Args:
        text: LLVM IR of one module; triple and data layout may be left out.
        names: the functions to export; their addresses are valid only while the result is alive.
        target: the CPU to compile for, from :func:`fusecell.compiler.backend.target.host_target`.

    Raises:
        CompilerError: LLVM refuses the text (the message has the line), or it lacks one of the names.

    Example:
        >>> import ctypes
        >>> from fusecell.compiler.backend.jit import load
        >>> from fusecell.compiler.backend.target import host_target
        >>> text = "define i32 @next(i32 %i) { %j = add i32 %i, 1 ret i32 %j }"
        >>> code = load(text, ["next"], host_target())
        >>> ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(code.address("next"))(41)
        42
    """
    effort = llvm.EFFORT
    request = (text, target, frozenset(names), effort)
    loaded = _live.get(request)
    if loaded is not None:
        return loaded
    with llvm.lock:
        # Another thread may have loaded it while this one waited for the lock.
        loaded = _live.get(request)
        if loaded is None:
            key = cache_key(text, target.cpu, target.features, target.triple, llvm.VERSIONS, str(effort))
            loaded = _read(key, text, names, target, effort) or _compile(key, text, names, target, effort)
            _live[request] = loaded
        return loaded


def _read(key: str, text: str, names: Sequence[str], target: Target, effort: int) -> Loaded | None:
    code = read_entry(key)
    if code is None:
        return None
    try:
        library = llvm.link(code, names)
    except CompilerError:
        return None  # compiling anew either replaces the entry or says what is wrong with the text
    return Loaded(text, target, library, effort=effort, from_cache=True, object_size=len(code))


def _compile(key: str, text: str, names: Sequence[str], target: Target, effort: int) -> Loaded:
    code = llvm.object_code(text, names, target.cpu, target.features, target.triple, effort)
    library = llvm.link(code, names)
    write_entry(key, code)
    return Loaded(text, target, library, effort=effort, from_cache=False, object_size=len(code))
