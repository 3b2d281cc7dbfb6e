"""What a compiled program depends on: everything of a cell that its step may read, but for tensors' values."""

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
_OWN = frozenset(vars(nn.Module()))
_CONSTANT = (type, BuiltinFunctionType, torch._ops.OperatorBase)
_PLAIN_TENSORS = frozenset((Tensor, nn.Parameter))


def signature(module: nn.Module, _seen: dict[int, int] | None = None) -> Key:
    """A key that changes whenever the module would trace differently.

    It sees every bool, number, string and None, alone, in tuples, lists and dicts or in the attributes of other
    objects; functions and classes by identity; the shape, dtype, requires_grad and tying of
    tensors; the training flag; whether
    there are hooks; and all submodules. Globals and closures it does not see.

    A value stands as (name, type, content), without the name in a sequence; a container's content is a tuple of such.
    """
    seen = {} if _seen is None else _seen
    seen.setdefault(id(module), len(seen))
    state = vars(module)
    hooks = state["_forward_hooks"] or state["_forward_pre_hooks"]
    hooks = hooks or state["_backward_hooks"] or state["_backward_pre_hooks"]
    found: list[Any] = [type(module), bool(hooks)]
    for name, value in state.items():
        kind = type(value)
        if kind in _ATOMS:
            found.append((name, kind, value))
        elif kind in _PLAIN_TENSORS:
            found.append(_tensor(name, value, seen))
        elif name not in _OWN:
            found.append((name, *_frozen(value, seen)))
    for table in (state["_parameters"], state["_buffers"]):
        for name, tensor in table.items():
            found.append(_tensor(name, tensor, seen))
    for name, part in state["_modules"].items():
        found.append((name, type(part), () if part is None else signature(part, seen)))
    return tuple(found)


def without_tensors(key: Key) -> Key:
    """A signature without its tensors: everything else that decides what the module computes from them."""
    found: list[Any] = []
    for entry in key:
        if type(entry) is not tuple:
            found.append(entry)
        elif not any(part is Tensor for part in entry[:2]):
            found.append(without_tensors(entry))
    return tuple(found)


def without_attributes(key: Key, paths: Collection[str]) -> Key:
    """A signature without some attributes, by path."""
    here = {path for path in paths if "." not in path}
    kept: list[Any] = []
    for entry in key:
        name = entry[0] if type(entry) is tuple else None
        if name in here:
            continue
        inner = [path.partition(".")[2] for path in paths if path.partition(".")[0] == name] if name else []
        kept.append((*entry[:-1], without_attributes(entry[-1], inner)) if any(inner) else entry)
    return tuple(kept)


def split_numbers(key: Key) -> tuple[Key, dict[str, Any]]:
    """A signature with its numbers blanked out, and the numbers by the path of their attribute."""
    numbers: dict[str, Any] = {}
    return _blanked(key, "", numbers), numbers


def _blanked(entries: Key, path: str, numbers: dict[str, Any]) -> Key:
    found: list[Any] = []
    for index, entry in enumerate(entries):
        if type(entry) is not tuple:
            found.append(entry)
            continue
        named = isinstance(entry[0], str)
        here = f"{path}.{entry[0]}".strip(".") if named else f"{path}[{index}]"
        kind, content = entry[named], entry[-1]
        if kind in _NUMBERS or (isinstance(kind, type) and issubclass(kind, np.number)):
            numbers[here] = content
            content = None
        elif type(content) is tuple:
            content = _blanked(content, here, numbers)
        found.append((*entry[:-1], content))
    return tuple(found)


def _tensor(name: str, value: Tensor | None, seen: dict[int, int]) -> Key:
    if value is None:
        return name, None
    kind = type(value)
    if kind is nn.Parameter:
        kind = Tensor  # functional_call puts a tensor in a parameter's place
    place = seen.setdefault(id(value), len(seen))
    return name, kind, place, value.shape, value.dtype, value.requires_grad, value.is_cpu or value.device.type


def _frozen(value: Any, seen: dict[int, int]) -> Key:
    """A value as (its type, its content)."""
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
    """Anything else: by its attributes where it has some, by its items, by value where it can be hashed."""
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
    """The attributes of an object, those in slots too where nothing else tells it from another."""
    fields: dict[str, Any] | None = getattr(value, "__dict__", None)
    hashed: object = type(value).__hash__
    if hashed is object.__hash__:
        names = [name for base in type(value).__mro__ for name in getattr(base, "__slots__", ())]
        slots = {name: getattr(value, name) for name in names if hasattr(value, name)}
        return {**slots, **(fields or {})} if slots else fields
    return fields
