"""Signature of a cell: all that the trace of its step depends on, except the values of tensors. A key of caches."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, MutableSequence, Set
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Key", "signature", "split_numbers", "without_attributes", "without_tensors"]

Key = tuple[Any, ...]

_ATOMS = frozenset((bool, int, str, type(None), torch.dtype, torch.device))
_NUMBERS = (int, float)
# The tables of nn.Module, read one by one below, and its bookkeeping. The training flag is an atom, and is read anyway.
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_CONSTANT = (type, BuiltinFunctionType, torch._ops.OperatorBase)
_PLAIN_TENSORS = frozenset((Tensor, nn.Parameter))


def signature(module: nn.Module, _seen: dict[int, int] | None = None) -> Key:
    """Return a key that changes whenever the module would trace differently.

    It contains every bool, number, string and None, alone, in tuples, lists and dicts or in the attributes of other
    objects; functions and classes by identity; the shape, dtype, requires_grad and tying of tensors; the training
    flag; whether there are hooks; and all submodules. It does not contain globals and closures.

    A value is an entry (name, type, content), without the name in a sequence; a container's content is a tuple of
    entries.
    """
    # Objects are numbered in the order in which they are met, so that tied tensors have one number in every copy of a
    # module, and an object that contains itself ends the walk.
    seen = {} if _seen is None else _seen
    seen.setdefault(id(module), len(seen))
    state = vars(module)
    hooks = state["_forward_hooks"] or state["_forward_pre_hooks"]
    hooks = hooks or state["_backward_hooks"] or state["_backward_pre_hooks"]
    entries: list[Any] = [type(module), bool(hooks)]
    for name, value in state.items():
        kind = type(value)
        # Most attributes are one of the first two kinds; a signature is taken in every call that no guard answers.
        if kind in _ATOMS:
            entries.append((name, kind, value))
        elif kind in _PLAIN_TENSORS:
            entries.append(_tensor(name, value, seen))
        elif name not in _MODULE_ATTRIBUTES:
            entries.append((name, *_frozen(value, seen)))
    for table in (state["_parameters"], state["_buffers"]):
        for name, tensor in table.items():
            entries.append(_tensor(name, tensor, seen))
    for name, part in state["_modules"].items():
        entries.append((name, type(part), () if part is None else signature(part, seen)))
    return tuple(entries)


def without_tensors(key: Key) -> Key:
    """Return a signature without its tensors: all else that decides what the module computes from them."""
    entries: list[Any] = []
    for entry in key:
        if type(entry) is not tuple:
            entries.append(entry)
        elif not any(part is Tensor for part in entry[:2]):
            entries.append(without_tensors(entry))
    return tuple(entries)


def without_attributes(key: Key, paths: Collection[str]) -> Key:
    """Return a signature without some attributes, by path."""
    dropped = {path for path in paths if "." not in path}
    entries: list[Any] = []
    for entry in key:
        name = entry[0] if type(entry) is tuple else None
        if name in dropped:
            continue
        inner = [path.partition(".")[2] for path in paths if path.partition(".")[0] == name] if name else []
        entries.append((*entry[:-1], without_attributes(entry[-1], inner)) if any(inner) else entry)
    return tuple(entries)


def split_numbers(key: Key) -> tuple[Key, dict[str, Any]]:
    """Return a signature with its numbers blanked out, and the numbers by the path of their attribute.

    Cells that differ in a number alone are counted by it: a number that changes in every call, such as a schedule's,
    must not cause a compilation each time (`dispatch.program_cache`).
    """
    numbers: dict[str, Any] = {}
    return _blanked(key, "", numbers), numbers


def _blanked(entries: Key, path: str, numbers: dict[str, Any]) -> Key:
    blanked: list[Any] = []
    for index, entry in enumerate(entries):
        if type(entry) is not tuple:
            blanked.append(entry)
            continue
        named = isinstance(entry[0], str)
        entry_path = f"{path}.{entry[0]}".strip(".") if named else f"{path}[{index}]"
        kind, content = entry[named], entry[-1]
        if kind in _NUMBERS or (isinstance(kind, type) and issubclass(kind, np.number)):
            numbers[entry_path] = content
            content = None
        elif type(content) is tuple:
            content = _blanked(content, entry_path, numbers)
        blanked.append((*entry[:-1], content))
    return tuple(blanked)


def _tensor(name: str, value: Tensor | None, seen: dict[int, int]) -> Key:
    if value is None:
        return name, None
    kind = type(value)
    if kind is nn.Parameter:
        kind = Tensor  # functional_call puts a tensor in a parameter's place
    number = seen.setdefault(id(value), len(seen))
    return name, kind, number, value.shape, value.dtype, value.requires_grad, value.is_cpu or value.device.type


def _frozen(value: Any, seen: dict[int, int]) -> Key:
    """Return a value as (its type, its content), which can be hashed and compared."""
    kind = type(value)
    if isinstance(value, float):
        return kind, float.hex(value)  # -0.0 differs from 0.0 and nan equals itself
    if kind in _ATOMS or isinstance(value, int | str):
        return kind, value
    if isinstance(value, Tensor):
        return _tensor("", value, seen)[1:]
    if isinstance(value, tuple | list):
        return kind, tuple([_frozen(item, seen) for item in value])
    if isinstance(value, Mapping):
        return kind, tuple([(repr(key), *_frozen(item, seen)) for key, item in value.items()])
    if isinstance(value, MethodType):
        return kind, (value.__func__, _frozen(value.__self__, seen))
    if isinstance(value, FunctionType):
        return kind, ref(value)  # it may enclose what it is an attribute of, which a key must not keep alive
    if isinstance(value, _CONSTANT):
        return kind, value
    return kind, _object(value, seen)


def _object(value: Any, seen: dict[int, int]) -> Any:
    """Return the content of any other object: its attributes, else its items, else itself where it can be hashed."""
    fields = _fields(value)
    if fields is not None:
        if id(value) in seen:
            return seen[id(value)]
        seen[id(value)] = len(seen)
        return tuple([(name, *_frozen(item, seen)) for name, item in fields.items()])
    if isinstance(value, np.ndarray):
        return *value.shape, value.dtype.str, value.tobytes()
    if isinstance(value, Set):
        return frozenset((type(item), item) for item in value)
    if isinstance(value, MutableSequence):
        return tuple([_frozen(item, seen) for item in value])
    return value if isinstance(value, Hashable) else None


def _fields(value: Any) -> dict[str, Any] | None:
    """Return the attributes of an object; those in slots too where its class is hashed by identity, so that no content
    would be left to tell one from another."""
    fields: dict[str, Any] | None = getattr(value, "__dict__", None)
    hashed: object = type(value).__hash__
    if hashed is object.__hash__:
        # Of a class that hashes by content, equality is what tells objects apart; others have their attributes alone.
        names = [name for base in type(value).__mro__ for name in getattr(base, "__slots__", ())]
        slots = {name: getattr(value, name) for name in names if hasattr(value, name)}
        return {**slots, **(fields or {})} if slots else fields
    return fields
