"""Replace torch.nn's recurrent layers and cells in a model by fusecell's, or the other way round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fusecell.cells import GRUCell, LSTMCell, RNNCell
from fusecell.drop_in import GRU, LSTM, RNN

__all__ = ["Replaced", "replace"]

_TO_FUSECELL: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: RNN,
    nn.GRU: GRU,
    nn.LSTM: LSTM,
    nn.RNNCell: RNNCell,
    nn.GRUCell: GRUCell,
    nn.LSTMCell: LSTMCell,
}
_TO_TORCH = {replacement: original for original, replacement in _TO_FUSECELL.items()}
# Attributes that change no result of torch.nn's: one saves memory, the other acts only with a mask.
_HARMLESS = ("recompute", "masked_output")


@dataclass(frozen=True)
class Replaced:
    """A report of what :func:`replace` changed; ``str()`` has a line for each module.

    Attributes:
        changed: (path, class before, class after) of each module that changed.
        left: (path, reason) of each recurrent module that was left alone.
    """

    changed: tuple[tuple[str, str, str], ...]
    left: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{path or '(itself)'}: {before} -> {after}" for path, before, after in self.changed]
        lines += [f"{path or '(itself)'}: left alone, {reason}" for path, reason in self.left]
        return "\n".join(lines) or "nothing to replace"


def replace(model: nn.Module, *, back: bool = False) -> Replaced:
    """Replace every torch.nn RNN, GRU, LSTM and cell in a model by fusecell's, in place.

    Each module stays the same object with the same parameters, hooks and state_dict; only its class changes. So
    optimizers, and all else that refers to it, remain valid.

    Example:
        >>> import torch, fusecell as fc
        >>> model = torch.nn.ModuleDict({"encoder": torch.nn.GRU(5, 10), "head": torch.nn.Linear(10, 2)})
        >>> print(fc.replace(model))
        encoder: torch.nn.GRU -> fusecell.GRU

    Arguments:
        model: any module.
        back: replace fusecell's by torch.nn's instead.

    Returns:
        A :class:`Replaced`; print it.

    Raises:
        TypeError: for anything but a module.
        ValueError: with ``back``, for a module that torch.nn can't compute, such as a GRU with ``reset_after=False``;
            nothing has changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace takes a torch.nn.Module, got {type(model).__name__}.")
    table = _TO_TORCH if back else _TO_FUSECELL
    modules = [(path, module) for path, module in model.named_modules() if type(module) in table]
    if back:
        for path, module in modules:
            _check_plain(path, module)
    changed = []
    for path, module in modules:
        before, after = type(module), table[type(module)]
        for name, value in _added(before if back else after).items():
            module.__dict__.pop(name, None) if back else module.__dict__.setdefault(name, value)
        # fusecell's classes subclass torch.nn's and add no slots, so assigning the class is enough. The object stays,
        # with its hooks, and optimizers keep referring to its parameters.
        module.__class__ = after
        changed.append((path, _name(before), _name(after)))
    return Replaced(tuple(changed), () if back else tuple(_subclasses(model)))


def _added(kind: type[nn.Module]) -> dict[str, Any]:
    """Return the attributes that a class of fusecell's adds, with the values at which torch.nn computes the same."""
    added: dict[str, Any] = vars(kind)["added_attributes"]
    return added


def _check_plain(path: str, module: nn.Module) -> None:
    """Raise ValueError if a module has an option that torch.nn lacks."""
    for name, value in _added(type(module)).items():
        option = getattr(module, name)
        if name not in _HARMLESS and option is not value and option != value:
            raise ValueError(
                f"replace: {path or type(module).__name__} has {name}={option!r}, which torch.nn can't compute; "
                f"nothing was changed. Set it to {value!r} first, or replace only the other modules."
            )


def _subclasses(model: nn.Module) -> list[tuple[str, str]]:
    """List the subclasses of torch.nn's recurrent modules: parametrized, quantized, or a user's own."""
    kinds = (nn.RNNBase, nn.RNNCellBase)
    return [
        (path, f"a subclass, {type(module).__name__}")
        for path, module in model.named_modules()
        if isinstance(module, kinds) and type(module) not in _TO_TORCH
    ]


def _name(kind: type[nn.Module]) -> str:
    return f"{'fusecell' if kind in _TO_TORCH else 'torch.nn'}.{kind.__name__}"
