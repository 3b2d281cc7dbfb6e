"""Signature of a cell: all that the trace of its step depends on, except the values of tensors. A key of caches.

What a module consists of, and which of its values cannot change inside, is said here once: identity guards
(:mod:`fusecell.compiler.frontend.guards`) are built on the same, so that they hold only while the signature is equal.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Collection, Mapping, MutableSequence, Set
from dataclasses import is_dataclass
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from fusecell.compiler.frontend.step_sources import sources_of
from fusecell.torch_internals import OPERATOR_TYPE, computes_weight

__all__ = [
    "HOOKS",
    "Key",
    "attribute_names",
    "content_of",
    "definition",
    "is_immutable",
    "is_plain_tensor",
    "is_reference",
    "is_small_data",
    "signature",
    "split_numbers",
    "without_attributes",
    "without_tensors",
]

Key = tuple[Any, ...]

_ATOMS = frozenset((bool, int, str, type(None), torch.dtype, torch.device))
_NUMBERS = (int, float)
# The tables of nn.Module, read one by one below, the training flag, and its bookkeeping.
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""The tables of a module's hooks: a step may run them, so with any of them it is another one."""
_CONSTANT = (type, BuiltinFunctionType, OPERATOR_TYPE)
_PLAIN_TENSORS = frozenset((Tensor, nn.Parameter))
_CONTAINERS = frozenset((list, tuple, dict, set, frozenset, torch.Size))
_NAMESPACES = frozenset((SimpleNamespace, Namespace))
_MOST_DATA = 64
"""Values that are compared in some ten microseconds; what a call has to do without guards takes longer."""


class _Seen(NamedTuple):
    """Numbers of what a walk has met, by id, in the order in which it was met.

    Tied tensors so have one number in every copy of a module, and an object that contains itself ends the walk.
    """

    tensors: dict[int, int]
    objects: dict[int, int]


def attribute_names(module: nn.Module) -> tuple[str, ...]:
    """Name the attributes of a module besides its parameters, buffers and submodules, those of nn.Module left out.

    Sorted: the order in which they were set is no part of the module. That of parameters, buffers and submodules is,
    as steps go through them in a loop.
    """
    return _attribute_names(tuple(vars(module)))


@functools.lru_cache(4096)
def _attribute_names(names: tuple[str, ...]) -> tuple[str, ...]:
    return "training", *sorted(set(names) - _MODULE_ATTRIBUTES)


def is_immutable(value: Any) -> bool:
    """Whether a value has one signature for as long as it is the same object, and keeps no other object alive."""
    kind = type(value)
    if kind is tuple:
        return all(map(is_immutable, value))
    if isinstance(value, BuiltinFunctionType):  # not a bound one, such as a list's append
        return value.__self__ is None or isinstance(value.__self__, ModuleType | type)
    return kind in _ATOMS or kind is float or isinstance(value, OPERATOR_TYPE)


def is_reference(value: Any) -> bool:
    """Whether a signature has a value by its identity, though it may keep others alive: a class or a function."""
    return isinstance(value, type | FunctionType)


def is_small_data(value: Any) -> bool:
    """Whether a value is a container or a configuration of few immutable values, and of nothing else.

    Its content is quickly compared with that of another time, though it may change inside.
    """
    return _count_of_data(value, _MOST_DATA) <= _MOST_DATA


def _count_of_data(value: Any, most: int) -> int:
    """Count the values in a container or a configuration; more than ``most`` where there is something else in it."""
    if most <= 0 or is_immutable(value):
        return 1
    if type(value) in _CONTAINERS:
        items = [*value.values(), *value] if isinstance(value, dict) else value
    elif (type(value) in _NAMESPACES or is_dataclass(type(value))) and hasattr(value, "__dict__"):
        items = vars(value).values()
    else:
        return most + 1
    count = 1
    for item in items:
        count += _count_of_data(item, most - count)
        if count > most:
            break
    return count


def content_of(value: Any) -> Key:
    """Return the content of what :func:`is_small_data` is, as it is in a signature."""
    return _frozen(value, _Seen({}, {}))


def is_plain_tensor(value: Any) -> bool:
    """Whether a value is a tensor or parameter, and of no other class, which could compute anything."""
    return type(value) in _PLAIN_TENSORS


def definition(kind: type) -> CodeType | None:
    """Return the code of a class's ``step``, or else ``forward``; None where it is no function of Python's.

    A notebook that reloads modules, or an assignment to the class, changes it under the same class.
    """
    function = getattr(kind, "step", None) or getattr(kind, "forward", None)
    return getattr(function, "__code__", None)


def signature(module: nn.Module, _seen: _Seen | None = None, without: Collection[str] = ()) -> Key:
    """Return a key that changes whenever the module would trace differently.

    It contains the code of ``step`` or ``forward``; every bool, number, string and None, alone, in tuples, lists and
    dicts or in the attributes of other objects; functions and classes by identity; the shape, dtype, requires_grad and
    tying of tensors; the training flag; whether there are hooks, and which weights these compute; and all submodules.
    Of globals and closures it contains the numbers and the user's functions that the code mentions.

    A value is an entry (name, type, content), without the name in a sequence; a container's content is a tuple of
    entries.

    Arguments:
        without: paths of attributes that are left out, as if the module had none of the kind.
    """
    seen = _Seen({}, {}) if _seen is None else _seen
    seen.objects.setdefault(id(module), len(seen.objects))
    state = vars(module)
    if "training" not in state:  # a module that torch.compile has wrapped: its attributes are the other's
        return type(module), signature(module.get_submodule("_orig_mod"), seen)
    code = definition(type(module))
    entries: list[Any] = [type(module), code and ref(code)]
    sources = sources_of(type(module), code)
    if sources is not None:
        entries += [(label, *_frozen_source(value, seen)) for label, value in sources.values]
    for table in HOOKS:
        if state[table]:
            entries.append((table, *_hooks(state[table], seen)))
    for name in _attribute_names(tuple(state)):
        if without and name in without:
            continue
        value = state[name]
        kind = type(value)
        # Most attributes are one of the first two kinds; a signature is taken in every call that no guard answers.
        if kind in _ATOMS:
            entries.append((name, kind, value))
        elif kind in _PLAIN_TENSORS:
            entries.append(_tensor(name, value, seen))
        else:
            entries.append((name, *_frozen(value, seen)))
    for table in (state["_parameters"], state["_buffers"]):
        for name, tensor in table.items():
            if not without or name not in without:
                entries.append(_tensor(name, tensor, seen))
    for name, part in state["_modules"].items():
        inner = [path.partition(".")[2] for path in without if path.partition(".")[0] == name] if without else ()
        entries.append((name, type(part), () if part is None else signature(part, seen, inner)))
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


def _frozen_source(value: Any, seen: _Seen) -> Key:
    """Return the value of a name that code mentions; a function's is its code."""
    return (CodeType, ref(value)) if isinstance(value, CodeType) else _frozen(value, seen)


def _hooks(table: Mapping[int, Any], seen: _Seen) -> tuple[type, Key]:
    """Return what hooks compute, as far as that is known: of any other only that it is there."""
    return tuple, tuple([_frozen(hook if computes_weight(hook) else None, seen) for hook in table.values()])


def _tensor(name: str, value: Tensor | None, seen: _Seen) -> Key:
    if value is None:
        return name, None
    kind = type(value)
    if isinstance(value, UninitializedBuffer | UninitializedParameter):
        return name, kind, id(value)
    if kind is nn.Parameter:
        kind = Tensor  # functional_call puts a tensor in a parameter's place
    number = seen.tensors.setdefault(id(value), len(seen.tensors))
    place = value.layout if value.is_cpu else value.device.type
    return name, kind, number, value.shape, value.dtype, value.requires_grad, place


def _frozen(value: Any, seen: _Seen) -> Key:
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


def _object(value: Any, seen: _Seen) -> Any:
    """Return the content of any other object: its attributes, else its items, else itself where it can be hashed."""
    fields = _fields(value)
    if fields is not None:
        if id(value) in seen.objects:
            return seen.objects[id(value)]
        seen.objects[id(value)] = len(seen.objects)
        return tuple([(name, *_frozen(item, seen)) for name, item in fields.items()])
    if isinstance(value, np.ndarray):
        return *value.shape, value.dtype.str, value.tobytes()
    if isinstance(value, Set):
        return frozenset((type(item), item) for item in value)
    if isinstance(value, MutableSequence):
        return tuple([_frozen(item, seen) for item in value])
    return value if _is_hashable(value) else None


def _is_hashable(value: Any) -> bool:
    # By its hash: a weak reference has the type of a hashable object, and the hash of what it refers to.
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _fields(value: Any) -> dict[str, Any] | None:
    """Return the attributes of an object; those in slots too where its class is hashed by identity, so that no content
    would be left to tell one from another."""
    fields: dict[str, Any] | None = getattr(value, "__dict__", None)
    hashed: object = type(value).__hash__
    if hashed is object.__hash__:
        names = [name for base in type(value).__mro__ for name in getattr(base, "__slots__", ())]
        slots = {name: getattr(value, name) for name in names if hasattr(value, name)}
        return {**slots, **(fields or {})} if slots else fields
    return fields
