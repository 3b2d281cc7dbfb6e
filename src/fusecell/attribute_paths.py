"""Paths of tensors in a module: of attributes, of what is in its containers, and of global variables.

A path is spelled as Python spells it, after the module: ``"inp.weight"``, ``"constants['tau']"``, ``"taps[0]"``.
That of a global variable begins with its module: ``"globals['my_cells']['TAU']"``.
"""

from __future__ import annotations

import ast
import copy
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["getter", "global_path", "is_plain", "tensors_inside", "with_tensor"]

_TOKEN = re.compile(r"\.?(\w+)|\[((?:'(?:[^'\\]|\\.)*')|(?:\"(?:[^\"\\]|\\.)*\")|-?\d+)\]")
_GLOBALS = "globals"
_LEAVES = (
    *(bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, torch.Generator),
    *(FunctionType, BuiltinFunctionType, MethodType, ModuleType, nn.Module),
)

Token = tuple[bool, Any]
"""A step of a path: whether it is an attribute, not an item, and its name or key."""


def is_plain(path: str) -> bool:
    """Whether a path has attributes only, of the module and its submodules."""
    return "[" not in path


def tensors_inside(value: Any, path: str, seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in a container, or in an object's attributes, with its path."""
    seen = set() if seen is None else seen
    if isinstance(value, _LEAVES) or id(value) in seen:
        return
    if isinstance(value, Tensor):
        yield path, value
        return
    seen.add(id(value))
    if isinstance(value, tuple | list):
        for position, item in enumerate(value):
            yield from tensors_inside(item, f"{path}[{position}]", seen)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, str | int) and not isinstance(key, bool):
                yield from tensors_inside(item, f"{path}[{key!r}]", seen)
    else:
        for name, item in getattr(value, "__dict__", {}).items():
            if name.isidentifier():
                yield from tensors_inside(item, f"{path}.{name}", seen)


def global_path(tensor: Tensor, names: Mapping[str, Any]) -> str | None:
    """Return the path of a tensor that is a global variable, or in one; None if it is none of these globals."""
    module = names.get("__name__")
    if not isinstance(module, str) or getattr(sys.modules.get(module), "__dict__", None) is not names:
        return None
    for name, value in names.items():
        if value is tensor:
            return f"{_GLOBALS}[{module!r}][{name!r}]"
    for name, value in names.items():
        if isinstance(value, tuple | list | dict):
            for path, inner in tensors_inside(value, f"{_GLOBALS}[{module!r}][{name!r}]"):
                if inner is tensor:
                    return path
    return None


@lru_cache(4096)
def getter(path: str) -> Callable[[nn.Module], Any]:
    """Return a function that takes the tensor at a path out of a module."""
    tokens = _tokens(path)
    if tokens[0] == (True, _GLOBALS) and len(tokens) > 2:
        (_, module), *rest = tokens[1:]
        return lambda owner: _taken(vars(sys.modules[module]), rest)
    return lambda owner: _taken(owner, tokens)


def _taken(owner: Any, tokens: list[Token]) -> Any:
    for is_attribute, name in tokens:
        owner = getattr(owner, name) if is_attribute else owner[name]
    return owner


def with_tensor(module: nn.Module, path: str, value: Tensor) -> None:
    """Set a tensor of a module; containers on the way to it are copied, and so left as they are elsewhere.

    A tensor among global variables is left alone.
    """
    tokens = _tokens(path)
    if tokens[0] == (True, _GLOBALS) and not hasattr(module, _GLOBALS):
        return
    owner = module
    while len(tokens) > 1 and isinstance(getattr(owner, tokens[0][1], None), nn.Module):
        owner = getattr(owner, tokens[0][1])
        tokens = tokens[1:]
    name = tokens[0][1]
    _set(owner, name, _rebuilt(getattr(owner, name), tokens[1:], value))


def _set(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute past nn.Module's ``__setattr__``, which wants a parameter in a parameter's place."""
    for table in (module._parameters, module._buffers, module.__dict__):
        if name in table:
            table[name] = value
            return
    raise AttributeError(f"{type(module).__name__} has no tensor {name!r}.")


def _rebuilt(container: Any, tokens: list[Token], value: Tensor) -> Any:
    """Return a copy of a container with another tensor at a path."""
    if not tokens:
        return value
    (is_attribute, name), rest = tokens[0], tokens[1:]
    if is_attribute:
        result = copy.copy(container)
        object.__setattr__(result, name, _rebuilt(getattr(container, name), rest, value))
        return result
    item = _rebuilt(container[name], rest, value)
    if isinstance(container, tuple):
        items = [*container[:name], item, *container[name + 1 :]]
        return type(container)(*items) if hasattr(container, "_fields") else type(container)(items)
    result = copy.copy(container)
    result[name] = item
    return result


@lru_cache(4096)
def _tokens(path: str) -> list[Token]:
    tokens, position = [], 0
    while position < len(path):
        match = _TOKEN.match(path, position)
        if match is None:
            raise ValueError(f"{path!r} is no path of a tensor.")
        tokens.append((True, match[1]) if match[1] is not None else (False, ast.literal_eval(match[2])))
        position = match.end()
    return tokens
