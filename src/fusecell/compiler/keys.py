"""What a compiled program depends on: everything of a cell that its step may read, but for tensors' values."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["signature"]

_SCALARS = (bool, int, float, str, type(None), torch.dtype, torch.device)
_OWN = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def signature(module: nn.Module, _seen: dict[int, int] | None = None) -> Hashable:
    """A key that changes whenever the module would trace differently.

    It sees every bool, number, string and None, alone, in tuples, lists and dicts or in the attributes of other
    objects; functions and classes by identity; the shape, dtype and tying of tensors; the training flag; whether
    there are hooks; and all submodules. Globals and closures it does not see.
    """
    seen = {} if _seen is None else _seen
    state = vars(module)
    tensors = [
        (name, _tensor(value, seen)) for kind in ("_parameters", "_buffers") for name, value in state[kind].items()
    ]
    plain = [(name, _frozen(value, seen)) for name, value in state.items() if name not in _OWN]
    parts = [(name, signature(part, seen)) for name, part in state["_modules"].items() if part is not None]
    hooks = any(state.get(name) for name in _HOOKS)
    return type(module), module.training, hooks, tuple(tensors), tuple(plain), tuple(parts)


def _tensor(value: Tensor | None, seen: dict[int, int]) -> Hashable:
    if value is None:
        return None
    return seen.setdefault(id(value), len(seen)), tuple(value.shape), value.dtype, value.device.type


def _frozen(value: Any, seen: dict[int, int]) -> Hashable:
    if isinstance(value, _SCALARS):
        return type(value), repr(value) if isinstance(value, float) else value
    if isinstance(value, Tensor):
        return _tensor(value, seen)
    if isinstance(value, tuple | list):
        return type(value), tuple(_frozen(item, seen) for item in value)
    if isinstance(value, Mapping):
        return type(value), tuple((repr(key), _frozen(item, seen)) for key, item in value.items())
    if callable(value) and not isinstance(value, nn.Module):
        return cast("Hashable", value if isinstance(value, Hashable) else type(value))
    return _object(value, seen)


def _object(value: Any, seen: dict[int, int]) -> Hashable:
    """Anything else: by its attributes where it has some, by value where it can be hashed."""
    fields = getattr(value, "__dict__", None)
    if fields is not None:
        if id(value) in seen:
            return type(value), seen[id(value)]
        seen[id(value)] = len(seen)
        return type(value), tuple((name, _frozen(item, seen)) for name, item in fields.items())
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, value.tobytes()
    if isinstance(value, set):
        return frozenset(value)
    by_value: Hashable = value if isinstance(value, Hashable) else None
    return type(value), by_value
