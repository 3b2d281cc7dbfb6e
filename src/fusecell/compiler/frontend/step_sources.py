"""What the code of a step refers to outside of its module: helper functions, numbers, methods and enclosed variables.

A notebook defines a helper anew, or another value of a constant; the class of the cell stays the same. The code of
``step``, and of all of the user's functions that it mentions, says which names these are, so that a compiled step is
not used after one of them has changed. What is inside of other objects, such as a global dict, is not followed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from operator import attrgetter, is_, itemgetter
from pathlib import Path
from types import CellType, CodeType, FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch

__all__ = ["StepSources", "sources_of"]

# Functions in files that begin so are libraries', which nobody edits while a program runs.
_LIBRARIES = (
    str(Path(os.__file__).parent),
    str(Path(torch.__file__).parents[1]),
    str(Path(__file__).parents[2]),
    "<frozen",
)
_ATOMS = (bool, int, float, complex, str, bytes, type(None))
_MOST = 256
"""Names that are followed at the most."""


class Name(NamedTuple):
    """A name that code mentions, and its present value.

    Arguments:
        table: the global variables that it is one of; None for an attribute of the class and for an enclosed variable.
        path: of the attribute, ``"k.fget"`` for a property; empty for any other.
        cell: that of an enclosed variable.
    """

    label: str
    value: Any
    table: dict[str, Any] | None = None
    path: str = ""
    cell: CellType | None = None

    def reader(self) -> Callable[[type], Any]:
        """Return a function of the class that reads the name anew."""
        table, cell, key = self.table, self.cell, self.label.partition(" ")[2]
        if table is not None:
            return lambda kind: table[key]
        if cell is not None:
            return lambda kind: cell.cell_contents
        return attrgetter(self.path)


class StepSources:
    """The values of the names that a step's code mentions, at a time.

    Functions are compared by their code, and those with defaults or enclosed variables, of which two may share a code,
    by identity too. None is kept alive here: it may enclose the module.

    Attributes:
        values: by what they are called, "global alpha"; of a function its code, and its defaults besides.
    """

    def __init__(self, names: Sequence[Name]) -> None:
        functions = [name for name in names if type(name.value) is FunctionType]
        values = [(name.label, _content(name.value)) for name in names]
        self.values = (*values, *(entry for name in functions for entry in _defaults(name.value)))
        self._identities = [(name.reader(), ref(name.value)) for name in functions if _has_state(name.value)]
        # Compared in every call, so in as few steps of Python as there are kinds of names.
        self._globals: list[tuple[dict[str, Any], Callable[..., Any], tuple[Any, ...], bool]] = []
        tables = {id(name.table): name.table for name in names if name.table is not None}
        for table in tables.values():
            for are_functions in (False, True):
                own = [
                    name
                    for name in names
                    if name.table is table and (type(name.value) is FunctionType) == are_functions
                ]
                if own:
                    keys = [name.label.partition(" ")[2] for name in own]
                    self._globals.append((table, _getter(keys), _contents(own), are_functions))
        members = [name for name in names if name.path]
        paths = [name.path + (".__code__" if type(name.value) is FunctionType else "") for name in members]
        self._members = (attrgetter(*paths), _contents(members)) if len(paths) > 1 else None
        self._member = (attrgetter(*paths), _contents(members)[0]) if len(paths) == 1 else None
        self._cells = [(name.cell, _content(name.value)) for name in names if name.cell is not None]

    def is_current(self, kind: type) -> bool:
        """Whether all names have the values that they had.

        Arguments:
            kind: the class.
        """
        try:
            for table, get, contents, are_functions in self._globals:
                values = get(table)
                if not all(map(is_, map(_CODE, values) if are_functions else values, contents)):
                    return False
            if self._members is not None and not all(map(is_, self._members[0](kind), self._members[1])):
                return False
            if self._member is not None and self._member[0](kind) is not self._member[1]:
                return False
            if not all(_content(cell.cell_contents) is content for cell, content in self._cells):
                return False
            return all(read(kind) is function() for read, function in self._identities)
        except (KeyError, AttributeError, ValueError):  # a name is gone, or something else
            return False


_CODE = attrgetter("__code__")


def _has_state(function: FunctionType) -> bool:
    """Whether a function computes with more than its code says."""
    return bool(function.__closure__ or function.__defaults__ or function.__kwdefaults__)


def _defaults(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Iterate over the followed defaults of a function's parameters."""
    values = [*enumerate(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()]
    for name, value in values:
        if _is_followed(value):
            yield f"default {name} of {function.__qualname__}", _content(value)


def _content(value: Any) -> Any:
    return value.__code__ if type(value) is FunctionType else value


def _contents(names: Sequence[Name]) -> tuple[Any, ...]:
    return tuple([_content(name.value) for name in names])


def _getter(keys: Sequence[str]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """Return a function that takes these entries out of a table, as a tuple."""
    if len(keys) > 1:
        return itemgetter(*keys)
    (key,) = keys
    return lambda table: (table[key],)


_SOURCES: WeakKeyDictionary[type, tuple[CodeType, StepSources]] = WeakKeyDictionary()


def sources_of(kind: type, code: CodeType | None) -> StepSources | None:
    """Return what a class's step refers to, as it is now; None where it is a library's or refers to nothing.

    Arguments:
        code: of its ``step`` or ``forward``.
    """
    if code is None or not _is_users(code.co_filename):
        return None
    before = _SOURCES.get(kind)
    if before is not None and before[0] is code and before[1].is_current(kind):
        return before[1] if before[1].values else None
    function = getattr(kind, "step", None) or getattr(kind, "forward", None)
    sources = StepSources(_names(kind, function) if isinstance(function, FunctionType) else [])
    _SOURCES[kind] = code, sources
    return sources if sources.values else None


def _names(kind: type, function: FunctionType) -> list[Name]:
    """List the names that a function mentions, and those of the functions that they lead to."""
    names: dict[tuple[int, str], Name] = {}
    left, seen = [function], {function}
    if _has_state(function):
        own = Name(f"class {function.__name__}", function, path="step" if hasattr(kind, "step") else "forward")
        names[0, own.label] = own
    while left and len(names) < _MOST:
        function = left.pop()
        for name in _own_names(kind, function):
            place = name.cell if name.table is None else name.table
            names.setdefault((0 if place is None else id(place), name.label), name)
            if isinstance(name.value, FunctionType) and name.value not in seen:
                seen.add(name.value)
                left.append(name.value)
    return list(names.values())


def _own_names(kind: type, function: FunctionType) -> Iterator[Name]:
    table = function.__globals__
    for name in _mentioned(function.__code__):
        if name in table and _is_followed(table[name]):
            yield Name(f"global {name}", table[name], table=table)
        member = getattr(kind, name, None)
        value, path = (member.fget, f"{name}.fget") if isinstance(member, property) else (member, name)
        if value is not None and _is_followed(value):
            yield Name(f"class {name}", value, path=path)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        if _is_followed(value):
            yield Name(f"enclosed {name} of {function.__qualname__}", value, cell=cell)


def _is_followed(value: Any) -> bool:
    if type(value) is FunctionType:
        return _is_users(value.__code__.co_filename)
    return type(value) in _ATOMS or (type(value) is tuple and all(type(each) in _ATOMS for each in value))


def _mentioned(code: CodeType) -> Iterator[str]:
    """Iterate over the names that some code reads, as global variables or attributes; those of its inner code too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _mentioned(constant)


@lru_cache(1024)
def _is_users(filename: str) -> bool:
    """Whether a file is the user's, and not a library's; what is typed at a prompt, ``<stdin>``, is the user's."""
    return not filename.startswith(_LIBRARIES)
