"""``replace``: torch.nn's recurrent layers and cells in a model of the user's become fusecell's, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fusecell.cells import GRUCell, LSTMCell, RNNCell
from fusecell.drop_in import GRU, LSTM, RNN

__all__ = ["Replaced", "replace"]

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: RNN,
    nn.GRU: GRU,
    nn.LSTM: LSTM,
    nn.RNNCell: RNNCell,
    nn.GRUCell: GRUCell,
    nn.LSTMCell: LSTMCell,
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
_LAYER: dict[str, Any] = {"recompute": False, "masked_output": "hold", "tbptt": None, "clip_state_grad": None}
_GATED: dict[str, Any] = {"activation": "tanh", "gate_activation": "sigmoid"}
# What ours have beside their namesakes' attributes, with the values at which both compute the same.
_EXTRAS: dict[type[nn.Module], dict[str, Any]] = {
    RNN: {**_LAYER, "activation": None},
    GRU: {**_LAYER, **_GATED, "reset_after": True},
    LSTM: {**_LAYER, **_GATED},
    RNNCell: {"activation": None},
    GRUCell: {**_GATED, "reset_after": True},
    LSTMCell: {**_GATED, "proj_size": 0},
}
# What changes no number that torch.nn computes: it takes no mask.
_HARMLESS = ("recompute", "masked_output")


@dataclass(frozen=True)
class Replaced:
    """What :func:`replace` did; printed, a line for each module.

    Attributes:
        changed: the path of each module that changed, with its class before and after.
        left: the path of each recurrent module that stayed, with the reason.
    """

    changed: tuple[tuple[str, str, str], ...]
    left: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{path or '(itself)'}: {before} -> {after}" for path, before, after in self.changed]
        lines += [f"{path or '(itself)'}: left alone, {reason}" for path, reason in self.left]
        return "\n".join(lines) or "nothing to replace"


def replace(model: nn.Module, *, back: bool = False) -> Replaced:
    """Turn every torch.nn RNN, GRU, LSTM and cell in a model into fusecell's, in place.

    Each module stays the object that it is, with its parameters, hooks and state_dict: only its class changes, so
    optimizers and whatever else refers to it go on.

    Example:
        >>> import torch, fusecell as fc
        >>> model = torch.nn.ModuleDict({"encoder": torch.nn.GRU(5, 10), "head": torch.nn.Linear(10, 2)})
        >>> print(fc.replace(model))
        encoder: torch.nn.GRU -> fusecell.GRU

    Arguments:
        model: any module.
        back: undo it.

    Returns:
        A :class:`Replaced`; print it.

    Raises:
        TypeError: for anything but a module.
        ValueError: with ``back``, for a module that torch.nn can't compute, such as a GRU with ``reset_after=False``;
            nothing has changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace takes a torch.nn.Module, got {type(model).__name__}.")
    table = _THEIRS if back else _OURS
    found = [(path, module) for path, module in model.named_modules() if type(module) in table]
    if back:
        for path, module in found:
            _check_plain(path, module)
    changed = []
    for path, module in found:
        before, after = type(module), table[type(module)]
        for name, value in _EXTRAS[before if back else after].items():
            module.__dict__.pop(name, None) if back else module.__dict__.setdefault(name, value)
        module.__class__ = after
        changed.append((path, _name(before), _name(after)))
    return Replaced(tuple(changed), () if back else tuple(_left(model)))


def _check_plain(path: str, module: nn.Module) -> None:
    for name, value in _EXTRAS[type(module)].items():
        mine = getattr(module, name)
        if name not in _HARMLESS and mine is not value and mine != value:
            raise ValueError(
                f"replace: {path or type(module).__name__} has {name}={mine!r}, which torch.nn can't compute; nothing "
                "was changed."
            )


def _left(model: nn.Module) -> list[tuple[str, str]]:
    """Recurrent modules of torch's that are subclasses: parametrized, quantized, or somebody's own."""
    kinds = (nn.RNNBase, nn.RNNCellBase)
    return [
        (path, f"a subclass, {type(module).__name__}")
        for path, module in model.named_modules()
        if isinstance(module, kinds) and type(module) not in _THEIRS
    ]


def _name(kind: type[nn.Module]) -> str:
    return f"{'fusecell' if kind in _THEIRS else 'torch.nn'}.{kind.__name__}"
