"""Classes of torch.nn and of fusecell in place of one another: a module changes its class and stays the same object.

fusecell's classes subclass torch.nn's and add no slots, so assigning the class is enough: hooks, parameters and all
that refers to the module, such as an optimizer, remain.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fusecell.cells.torch_nn import GRUCell, LSTMCell, RNNCell, torch_class
from fusecell.drop_in.layers import GRU, LSTM, RNN

__all__ = ["become", "class_name", "fusecell_class", "is_torchs_recurrent", "original_class"]

_TO_FUSECELL: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: RNN,
    nn.GRU: GRU,
    nn.LSTM: LSTM,
    nn.RNNCell: RNNCell,
    nn.GRUCell: GRUCell,
    nn.LSTMCell: LSTMCell,
}
_TO_TORCH = {replacement: original for original, replacement in _TO_FUSECELL.items()}


def is_torchs_recurrent(module: nn.Module) -> bool:
    """Return whether a module is torch.nn's recurrent layer or cell, or a subclass of one, but not fusecell's."""
    return isinstance(module, nn.RNNBase | nn.RNNCellBase) and original_class(type(module)) is None


def original_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Return the class whose place one of fusecell's takes; None for any other class, a user's subclass included."""
    original: type[nn.Module] | None = vars(kind).get("takes_place_of") or _TO_TORCH.get(kind)
    return original


def fusecell_class(module: nn.Module) -> type[nn.Module] | str:
    """Return the class that takes the place of a module's, one of torch.nn's or a subclass; else why there is none."""
    kind: Any = type(module)
    if is_parametrized(module):
        return "parametrized, which changes its class: replace it before"
    return _TO_FUSECELL.get(kind) or _combined(kind)


@functools.cache
def _combined(kind: Any) -> type[nn.Module] | str:
    """Build the subclass of a user's class in whose calls of torch.nn's forward fusecell's answers."""
    base = torch_class(kind)
    if base not in _TO_FUSECELL:
        return f"a subclass of {class_name(base)}, which has no forward"
    target: Any = _TO_FUSECELL[base]
    own = [each for each in kind.__mro__ if each not in base.__mro__]
    forward = kind.forward
    code = getattr(forward, "__code__", None)
    # A method that says super() encloses __class__.
    if forward is not base.forward and (code is None or "__class__" not in code.co_freevars):
        return f"the forward of {kind.__name__} is its own"
    fusecells = {name for each in target.__mro__ for name in vars(each) if each not in base.__mro__}
    both = sorted(name for each in own for name in vars(each) if name in fusecells and not _is_shared(name))
    if both:
        return f"{kind.__name__} has {', '.join(both)}, a name that fusecell's {target.__name__} has too"

    def __reduce_ex__(self: Any, protocol: int) -> tuple[Any, ...]:  # no name finds this class
        _, _, *rest = kind.__reduce_ex__(self, max(protocol, 2))
        return _blank, (kind,), *rest

    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    body = {**names, "takes_place_of": kind, "__reduce_ex__": __reduce_ex__}
    try:
        combined = types.new_class(kind.__name__, (kind, target), exec_body=lambda namespace: namespace.update(body))
    except TypeError as error:
        return f"{kind.__name__} can't be combined with fusecell's {target.__name__}: {error}"
    return combined


def _is_shared(name: str) -> bool:
    """Return whether both classes may have a name, as one calls the other's by super() or every class has it."""
    return name in ("forward", "extra_repr", "reset_parameters") or (name.startswith("__") and name.endswith("__"))


def _blank(kind: Any) -> nn.Module:
    """Return an object of the class that takes a user's class's place, for pickle to fill."""
    combined: Any = _combined(kind)
    module: nn.Module = combined.__new__(combined)
    return module


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change a module's class to the one that takes its place, or to the one whose place it takes."""
    before: Any = type(module)
    after: Any = kind
    added = getattr(after, "added_attributes", None)
    if added is None:
        for name in before.added_attributes:
            module.__dict__.pop(name, None)
    else:
        for name, value in added.items():
            module.__dict__.setdefault(name, value)
    module.__class__ = after


def class_name(kind: type[nn.Module]) -> str:
    """Name a class for a report: ``torch.nn.GRU``, ``fusecell.GRU``, and any other by its module."""
    if kind in _TO_FUSECELL:
        return f"torch.nn.{kind.__name__}"
    if kind in _TO_TORCH:
        return f"fusecell.{kind.__name__}"
    origin = "fusecell's " if "takes_place_of" in vars(kind) else ""
    return f"{origin}{kind.__module__}.{kind.__qualname__}"
