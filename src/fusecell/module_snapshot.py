"""Take a snapshot of a module, list what has changed since, and undo it.

A snapshot covers the attributes of the module, of its submodules and of every object that they refer to, the content
of lists, dicts, sets and arrays, and of each tensor its memory, hooks, gradient and requires_grad. It doesn't cover
what a global variable or a closure refers to.
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, MutableSequence, MutableSet
from contextlib import contextmanager
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusecell.torch_internals import OPERATOR_TYPE

__all__ = ["Change", "Snapshot", "preserved"]

_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_LEAVES = (*_ATOMS, type, FunctionType, BuiltinFunctionType, ModuleType, OPERATOR_TYPE, torch.Generator)
_TABLES = ("_parameters", "_buffers", "_modules")
_PLAIN_CONTAINERS = (dict, list, set, deque, OrderedDict)
_ABSENT = object()


@dataclass(frozen=True)
class Change:
    """A change of an attribute, or of something inside an attribute's value.

    Arguments:
        path: the path from the module, ``"part.count"`` or ``"sizes[0]"``.
        how: "sets", "adds", "deletes" or "changes".
        attribute: the path of the module's attribute that ``path`` begins with.
    """

    path: str
    how: str
    attribute: str


class Snapshot:
    """A copy of a module's state, to list later what has changed and to undo it.

    Example:
        >>> import fusecell as fc
        >>> from fusecell.module_snapshot import Snapshot
        >>> cell = fc.GRUCell(3, 4)
        >>> before = Snapshot(cell)
        >>> cell.count = 1
        >>> [(change.how, change.path) for change in before.changes()]
        [('adds', 'count')]
        >>> before.restore()
        >>> hasattr(cell, "count")
        False

    Arguments:
        module: the module, with everything that it refers to.
        values: copy the tensors' values too. Without, a write to a tensor is noticed only where torch counts its writes
            (not in inference mode), and can't be undone.
    """

    def __init__(self, module: nn.Module, *, values: bool = False) -> None:
        self._values = values
        self._seen: set[int] = set()
        self._parts: list[_Part] = []
        self._visit(module, "", "")

    def changes(self) -> list[Change]:
        """List what has changed, each path once."""
        changes: dict[str, Change] = {}
        for part in self._parts:
            for path, how in part.changes():
                changes.setdefault(path, Change(path, how, part.attribute or path))
        return list(changes.values())

    def restore(self) -> None:
        """Undo all changes."""
        with torch.no_grad():
            for part in self._parts:
                if any(True for _ in part.changes()):
                    part.restore()

    def _visit(self, value: Any, path: str, attribute: str) -> None:
        """Copy a value and everything that it refers to.

        Arguments:
            path: from the module to the value.
            attribute: the path of the module's attribute through which it is reached; empty for the module.
        """
        if isinstance(value, _LEAVES) or id(value) in self._seen:
            return
        if isinstance(value, tuple | frozenset):
            self._visit_items(value, path, attribute)
            return
        if isinstance(value, MethodType):
            self._visit(value.__self__, path, attribute)
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            self._parts.append(_Tensor(value, path, attribute, self._values))
        elif isinstance(value, nn.Module):
            self._visit_module(value, path, attribute)
        elif isinstance(value, dict):
            self._parts.append(_Mapping(value, path, attribute))
            for key, item in value.items():
                self._visit(item, f"{path}[{key!r}]", attribute)
        elif isinstance(value, MutableSequence | MutableSet):
            self._parts.append(_Items(value, path, attribute))
            if not isinstance(value, bytearray):
                self._visit_items(value, path, attribute)
        elif isinstance(value, np.ndarray):
            self._parts.append(_Array(value, path, attribute))
        elif isinstance(value, random.Random | np.random.Generator):
            self._parts.append(_Randomness(value, path, attribute))
        if not isinstance(value, nn.Module | Tensor) and type(value) not in _PLAIN_CONTAINERS:
            self._visit_fields(value, path, attribute)

    def _visit_items(self, items: Any, path: str, attribute: str) -> None:
        for index, item in enumerate(items):
            if not isinstance(item, _LEAVES):
                self._visit(item, f"{path}[{index}]", attribute)

    def _visit_module(self, module: nn.Module, path: str, attribute: str) -> None:
        start = path + "." if path else ""
        state = vars(module)
        # A module in a list or an object is no submodule: a change in it counts as one of the attribute that has it.
        is_submodule = not attribute
        self._parts.append(_Mapping(state, path, attribute, named=True))
        for name, value in state.items():
            if name in _TABLES and isinstance(value, dict):
                self._parts.append(_Mapping(value, path, attribute, named=True))
                self._seen.add(id(value))
                for key, item in value.items():
                    nested = isinstance(item, nn.Module) and is_submodule
                    self._visit(item, start + key, "" if nested else attribute or start + key)
            elif not isinstance(value, _LEAVES):
                self._visit(value, start + name, attribute or start + name)

    def _visit_fields(self, value: Any, path: str, attribute: str) -> None:
        """Copy the attributes of an object, those in slots too."""
        fields = getattr(value, "__dict__", None)
        if isinstance(fields, dict):
            self._parts.append(_Mapping(fields, path, attribute, named=True))
            for name, item in fields.items():
                self._visit(item, f"{path}.{name}", attribute)
        names = [name for base in type(value).__mro__ for name in _slots(base)]
        if names:
            self._parts.append(_Slots(value, names, path, attribute))
            for name in names:
                self._visit(getattr(value, name, None), f"{path}.{name}", attribute)


@dataclass
class _Part:
    """A value that can change; subclasses copy its content.

    Arguments:
        value: the value itself.
        path: from the module to it.
        attribute: the path of the module's attribute through which it is reached.
    """

    value: Any
    path: str
    attribute: str

    def changes(self) -> Iterator[tuple[str, str]]:
        """Iterate over (path, how) of each change."""
        raise NotImplementedError

    def restore(self) -> None:
        """Undo all changes."""
        raise NotImplementedError


class _Mapping(_Part):
    """A dict; with ``named``, the one in which an object has its attributes."""

    def __init__(self, value: dict[Any, Any], path: str, attribute: str, named: bool = False) -> None:
        super().__init__(value, path, attribute)
        self.named = named
        self.before = dict(value)

    def changes(self) -> Iterator[tuple[str, str]]:
        yield from _entries(self.before, self.value, self._path)

    def _path(self, key: Any) -> str:
        if self.named:
            return f"{self.path}.{key}" if self.path else str(key)
        return self.path

    def restore(self) -> None:
        self.value.clear()
        self.value.update(self.before)


class _Slots(_Part):
    """The slots of an object."""

    def __init__(self, value: Any, names: list[str], path: str, attribute: str) -> None:
        super().__init__(value, path, attribute)
        self.names = names
        self.before = self._now()

    def _now(self) -> dict[str, Any]:
        return {name: getattr(self.value, name) for name in self.names if hasattr(self.value, name)}

    def changes(self) -> Iterator[tuple[str, str]]:
        yield from _entries(self.before, self._now(), lambda name: f"{self.path}.{name}")

    def restore(self) -> None:
        # object's own methods: a frozen dataclass forbids its __setattr__.
        for name in self._now().keys() - self.before.keys():
            object.__delattr__(self.value, name)
        for name, value in self.before.items():
            object.__setattr__(self.value, name, value)


class _Items(_Part):
    """A list, a deque, a bytearray or a set."""

    def __init__(self, value: Any, path: str, attribute: str) -> None:
        super().__init__(value, path, attribute)
        self.before = list(value)

    def changes(self) -> Iterator[tuple[str, str]]:
        if isinstance(self.value, MutableSet):
            same = len(self.value) == len(self.before) and all(item in self.value for item in self.before)
        else:
            same = len(self.value) == len(self.before) and all(map(_same, self.value, self.before))
        if not same:
            yield self.path, "changes"

    def restore(self) -> None:
        if isinstance(self.value, MutableSet):
            self.value.clear()
            for item in self.before:
                self.value.add(item)
        elif isinstance(self.value, deque):
            self.value.clear()
            self.value.extend(self.before)
        else:
            del self.value[:]
            self.value.extend(self.before)


class _Array(_Part):
    """A NumPy array."""

    def __init__(self, value: Any, path: str, attribute: str) -> None:
        super().__init__(value, path, attribute)
        self.before = value.copy()

    def changes(self) -> Iterator[tuple[str, str]]:
        if self.value.shape != self.before.shape or self.value.tobytes() != self.before.tobytes():
            yield self.path, "changes"

    def restore(self) -> None:
        self.value[...] = self.before


class _Randomness(_Part):
    """A random generator of Python or NumPy."""

    def __init__(self, value: Any, path: str, attribute: str) -> None:
        super().__init__(value, path, attribute)
        self.before = self._now()

    def _now(self) -> Any:
        return self.value.getstate() if isinstance(self.value, random.Random) else self.value.bit_generator.state

    def changes(self) -> Iterator[tuple[str, str]]:
        if repr(self._now()) != repr(self.before):
            yield self.path, "draws from"

    def restore(self) -> None:
        if isinstance(self.value, random.Random):
            self.value.setstate(self.before)
        else:
            self.value.bit_generator.state = self.before


class _Tensor(_Part):
    """A tensor: its memory, the number of writes to it, its hooks, its gradient and requires_grad."""

    def __init__(self, value: Tensor, path: str, attribute: str, values: bool) -> None:
        super().__init__(value, path, attribute)
        self.memory = value.data
        self.hooks = dict(value._backward_hooks or {})
        self.grad = value.grad if value.is_leaf else None
        self.before = self._now()
        self.copy = value.detach().clone() if values else None

    def _now(self) -> tuple[Any, ...]:
        value: Tensor = self.value
        # _version raises for tensors of inference mode, whose writes torch doesn't count.
        version = None if value.is_inference() else value._version
        return version, value.requires_grad, self._address(value), value.shape, value.dtype

    @staticmethod
    def _address(value: Tensor) -> Any:
        try:
            return value.untyped_storage()._cdata, value.storage_offset(), value.stride()
        except (NotImplementedError, RuntimeError):  # sparse and other layouts have no such memory
            return None

    def _changed(self) -> bool:
        value: Tensor = self.value
        hooks = value._backward_hooks or {}
        if self._now() != self.before or hooks.keys() != self.hooks.keys():
            return True
        if value.is_leaf and value.grad is not self.grad:
            return True
        return self.copy is not None and not _equal(value.detach(), self.copy)

    def changes(self) -> Iterator[tuple[str, str]]:
        if self._changed():
            yield self.path, "changes"

    def restore(self) -> None:
        value: Tensor = self.value
        if self._address(value) != self.before[2] or value.shape != self.before[3]:
            value.data = self.memory
        if value.is_leaf:
            value.requires_grad_(self.before[1])
            value.grad = self.grad
        if value._backward_hooks is not None and value._backward_hooks.keys() != self.hooks.keys():
            value._backward_hooks.clear()
            value._backward_hooks.update(self.hooks)
        if self.copy is not None and not _equal(value.detach(), self.copy):
            value.detach().copy_(self.copy)
        self.before = self._now()  # the restoring copy_ counts as a write


def _equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have equal values, NaN equal to NaN."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _entries(before: dict[Any, Any], now: dict[Any, Any], path: Callable[[Any], str]) -> Iterator[tuple[str, str]]:
    """Iterate over (path, how) of each key whose value differs."""
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = before.get(key, _ABSENT), now.get(key, _ABSENT)
        if old is _ABSENT:
            yield path(key), "adds"
        elif new is _ABSENT:
            yield path(key), "deletes"
        elif not _same(old, new):
            yield path(key), "sets"


def _same(old: Any, new: Any) -> bool:
    """Return whether two values are the same object, or equal ones of an immutable type."""
    if old is new:
        return True
    if type(old) is not type(new):
        return False
    if isinstance(old, tuple):
        return len(old) == len(new) and all(map(_same, old, new))
    if isinstance(old, MethodType):
        return old.__func__ is new.__func__ and old.__self__ is new.__self__
    return isinstance(old, _ATOMS) and (old == new or (old != old and new != new))  # NaN differs from itself


def _slots(kind: type) -> list[str]:
    """List the names of a class's slots, private ones mangled as the compiler of Python does."""
    names = vars(kind).get("__slots__", ())
    names = [names] if isinstance(names, str) else list(names)
    mangled = [f"_{kind.__name__.lstrip('_')}{n}" if n.startswith("__") and not n.endswith("__") else n for n in names]
    return [name for name in mangled if name not in ("__dict__", "__weakref__")]


@contextmanager
def preserved(module: nn.Module) -> Iterator[Snapshot]:
    """Undo whatever changes in a module inside a ``with`` block, its tensors' values too."""
    before = Snapshot(module, values=True)
    try:
        yield before
    finally:
        before.restore()
