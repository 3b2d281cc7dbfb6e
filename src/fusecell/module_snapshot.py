"""A module as it was: what has changed since, in words, and how to put it back.

Seen are the attributes of the module, of its submodules and of every object they hold, what lists, dicts, sets and
arrays contain, and of each tensor its memory, its hooks, its gradient and whether it wants one. What a global variable
or a closure refers to is not.
"""

from __future__ import annotations

import functools
import linecache
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, MutableSequence, MutableSet
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinFunctionType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Change", "Snapshot", "changing_line", "left_as_it_was", "sentence"]

_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_LEAVES = (*_ATOMS, type, FunctionType, BuiltinFunctionType, ModuleType, torch._ops.OperatorBase, torch.Generator)
_TABLES = ("_parameters", "_buffers", "_modules")
_PLAIN_CONTAINERS = (dict, list, set, deque, OrderedDict)
_ABSENT = object()
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent), functools.__file__, "<")


@dataclass(frozen=True)
class Change:
    """What has changed: an attribute, or what an attribute holds.

    Arguments:
        path: from the module, ``"part.count"``.
        how: "sets", "adds", "deletes" or "changes".
        attribute: the path of the attribute of a module that ``path`` leads through.
    """

    path: str
    how: str
    attribute: str


class Snapshot:
    """Remember a module, to tell later what has changed and to put it back.

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
        module: it, and all that it holds.
        values: copy the tensors' values too; without, a tensor that was written to is seen as changed where torch
            counts its writes, and can't be put back.
    """

    def __init__(self, module: nn.Module, *, values: bool = False) -> None:
        self._values = values
        self._seen: set[int] = set()
        self._places: list[_Place] = []
        self._visit(module, "", "")

    def changes(self) -> list[Change]:
        """What has changed, each attribute once."""
        found: dict[str, Change] = {}
        for place in self._places:
            for path, how in place.changes():
                attribute = place.attribute or path
                found.setdefault(path, Change(path, how, attribute))
        return list(found.values())

    def restore(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for place in self._places:
                if any(True for _ in place.changes()):
                    place.restore()

    def _visit(self, value: Any, path: str, attribute: str) -> None:
        """Remember a value and all that it holds; ``attribute`` is the module's attribute that it belongs to."""
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
            self._places.append(_Tensor(value, path, attribute, self._values))
        elif isinstance(value, nn.Module):
            self._visit_module(value, path, attribute)
        elif isinstance(value, dict):
            self._places.append(_Mapping(value, path, attribute))
            for key, item in value.items():
                self._visit(item, f"{path}[{key!r}]", attribute)
        elif isinstance(value, MutableSequence | MutableSet):
            self._places.append(_Items(value, path, attribute))
            if not isinstance(value, bytearray):
                self._visit_items(value, path, attribute)
        elif isinstance(value, np.ndarray):
            self._places.append(_Array(value, path, attribute))
        elif isinstance(value, random.Random | np.random.Generator):
            self._places.append(_Randomness(value, path, attribute))
        if not isinstance(value, nn.Module | Tensor) and type(value) not in _PLAIN_CONTAINERS:
            self._visit_fields(value, path, attribute)

    def _visit_items(self, items: Any, path: str, attribute: str) -> None:
        for index, item in enumerate(items):
            if not isinstance(item, _LEAVES):
                self._visit(item, f"{path}[{index}]", attribute)

    def _visit_module(self, module: nn.Module, path: str, attribute: str) -> None:
        start = path + "." if path else ""
        state = vars(module)
        # A module inside a list or an object belongs to the attribute that holds it.
        own = not attribute
        self._places.append(_Mapping(state, path, attribute, named=True))
        for name, value in state.items():
            table = name in _TABLES
            if table and isinstance(value, dict):
                self._places.append(_Mapping(value, path, attribute, named=True))
                self._seen.add(id(value))
                for key, item in value.items():
                    inside = attribute if isinstance(item, nn.Module) and own else attribute or start + key
                    self._visit(item, start + key, inside)
            elif not isinstance(value, _LEAVES):
                self._visit(value, start + name, attribute or start + name)

    def _visit_fields(self, value: Any, path: str, attribute: str) -> None:
        """The attributes of an object, those in slots too."""
        fields = getattr(value, "__dict__", None)
        if isinstance(fields, dict):
            self._places.append(_Mapping(fields, path, attribute, named=True))
            for name, item in fields.items():
                self._visit(item, f"{path}.{name}", attribute)
        names = [name for base in type(value).__mro__ for name in _slots(base)]
        if names:
            self._places.append(_Slots(value, names, path, attribute))
            for name in names:
                self._visit(getattr(value, name, None), f"{path}.{name}", attribute)


@dataclass
class _Place:
    """Something that can change, where it is, and what it was."""

    value: Any
    path: str
    attribute: str

    def changes(self) -> Iterator[tuple[str, str]]:
        """The path of each change, and how it changed."""
        raise NotImplementedError

    def restore(self) -> None:
        raise NotImplementedError


class _Mapping(_Place):
    """A dict; with ``named`` the attributes of an object."""

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


class _Slots(_Place):
    """The attributes of an object that has slots."""

    def __init__(self, value: Any, names: list[str], path: str, attribute: str) -> None:
        super().__init__(value, path, attribute)
        self.names = names
        self.before = self._now()

    def _now(self) -> dict[str, Any]:
        return {name: getattr(self.value, name) for name in self.names if hasattr(self.value, name)}

    def changes(self) -> Iterator[tuple[str, str]]:
        yield from _entries(self.before, self._now(), lambda name: f"{self.path}.{name}")

    def restore(self) -> None:
        # Past a __setattr__ of the object's own, such as a frozen dataclass has.
        for name in self._now().keys() - self.before.keys():
            object.__delattr__(self.value, name)
        for name, value in self.before.items():
            object.__setattr__(self.value, name, value)


class _Items(_Place):
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


class _Array(_Place):
    """A NumPy array."""

    def __init__(self, value: Any, path: str, attribute: str) -> None:
        super().__init__(value, path, attribute)
        self.before = value.copy()

    def changes(self) -> Iterator[tuple[str, str]]:
        if self.value.shape != self.before.shape or self.value.tobytes() != self.before.tobytes():
            yield self.path, "changes"

    def restore(self) -> None:
        self.value[...] = self.before


class _Randomness(_Place):
    """A random generator of Python's or NumPy's."""

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


class _Tensor(_Place):
    """A tensor: its memory, how often it was written to, its hooks, its gradient and whether it wants one."""

    def __init__(self, value: Tensor, path: str, attribute: str, values: bool) -> None:
        super().__init__(value, path, attribute)
        self.memory = value.data
        self.hooks = dict(value._backward_hooks or {})
        self.grad = value.grad if value.is_leaf else None
        self.before = self._now()
        self.copy = value.detach().clone() if values else None

    def _now(self) -> tuple[Any, ...]:
        value: Tensor = self.value
        # A tensor of inference mode counts no writes.
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
        self.before = self._now()  # what was put back has been written to once more


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _entries(before: dict[Any, Any], now: dict[Any, Any], path: Callable[[Any], str]) -> Iterator[tuple[str, str]]:
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = before.get(key, _ABSENT), now.get(key, _ABSENT)
        if old is _ABSENT:
            yield path(key), "adds"
        elif new is _ABSENT:
            yield path(key), "deletes"
        elif not _same(old, new):
            yield path(key), "sets"


def _same(old: Any, new: Any) -> bool:
    """Whether one may stand for the other: the same object, or an equal one that can't change."""
    if old is new:
        return True
    if type(old) is not type(new):
        return False
    if isinstance(old, tuple):
        return len(old) == len(new) and all(map(_same, old, new))
    if isinstance(old, MethodType):
        return old.__func__ is new.__func__ and old.__self__ is new.__self__
    return isinstance(old, _ATOMS) and (old == new or (old != old and new != new))


def _slots(kind: type) -> list[str]:
    names = vars(kind).get("__slots__", ())
    names = [names] if isinstance(names, str) else list(names)
    hidden = [f"_{kind.__name__.lstrip('_')}{n}" if n.startswith("__") and not n.endswith("__") else n for n in names]
    return [name for name in hidden if name not in ("__dict__", "__weakref__")]


@contextmanager
def left_as_it_was(module: nn.Module) -> Iterator[Snapshot]:
    """Put back whatever of a module changes inside the block, its tensors' values too."""
    before = Snapshot(module, values=True)
    try:
        yield before
    finally:
        before.restore()


def sentence(changes: list[Change], line: str = "", name: str = "step") -> str:
    """Why a step that changes its module is not compiled, and what to write in its place.

    Arguments:
        changes: at least one.
        line: where, as words that follow ``in``; empty where that can't be told.
        name: what changes the module.
    """
    said = _joined([f"{change.how} self.{change.path}" for change in changes])
    first = changes[0].path.rpartition(".")[2].partition("[")[0]
    return (
        f"Its {name} changes the module: it {said}{f' in {line}' if line else ''}. The loop is compiled from one step, "
        "so what a step leaves on the module never reaches the next. Keep it in the state: name it in "
        f'`states = ("h", "{first}")`, give its size in `state_sizes`, and return its new value as part of the new '
        "state; what never changes belongs in __init__."
    )


def _joined(parts: list[str]) -> str:
    shown = parts[:4] + ([f"does as much to {len(parts) - 4} more"] if len(parts) > 4 else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def changing_line(before: Snapshot, run: Callable[[], object]) -> str:
    """Run something again, line by line, and tell at which of the user's lines something of a module has changed.

    Returns:
        The file and line, and the line itself; empty where nothing changed, or in no line of Python's. What ``run``
        raises is no concern of this.
    """
    found: list[str] = []
    last: list[tuple[str, int]] = []

    def look(frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        if found:
            return None
        if event == "call" and frame.f_code.co_filename.startswith(_LIBRARIES):
            return None
        if last and before.changes():
            found.append(_line(*last[-1]))
            return None
        caller = frame.f_back if event == "return" else frame
        while caller is not None and caller.f_code.co_filename.startswith(_LIBRARIES):
            caller = caller.f_back
        if caller is not None:
            last[:] = [(caller.f_code.co_filename, caller.f_lineno)]
        return look

    tracing = sys.gettrace()
    sys.settrace(look)
    try:
        run()
    except Exception:
        pass  # it raises again where it is run for its result
    finally:
        sys.settrace(tracing)
    if not found and last and before.changes():
        found.append(_line(*last[-1]))
    return found[0] if found else ""


def _line(name: str, number: int) -> str:
    source = linecache.getline(name, number).strip()
    source = source if len(source) < 100 else source[:97] + "..."
    return f"{Path(name).name}, line {number}" + (f": `{source}`" if source else "")
