"""Initial values for recurrent weights, on any cell or layer; each function changes its module in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.drop_in import GRU, LSTM, RNN

__all__ = ["chrono_", "forget_bias_", "gate_bias_", "orthogonal_"]

Module = TypeVar("Module", bound=nn.Module)

# Where a bias for the gates may stand: the one that gets the value, then the one that becomes 0 beside it.
_FIRST = ("bias_ih", "norm_ih.bias", "norm_ih_gates.bias")
_SECOND = ("bias_hh", "norm_hh.bias", "norm_hh_gates.bias")


def orthogonal_(module: Module, gain: float = 1.0) -> Module:
    r"""Make the recurrent matrix of every gate orthogonal: it neither shrinks nor stretches the state.

    .. math:: W_{h\cdot}^\top W_{h\cdot} = \mathrm{gain}^2 \, I

    Example:
        >>> import torch, fusecell as fc
        >>> gru = fc.init.orthogonal_(fc.GRU(5, 10))
        >>> w_r, w_z, w_n = gru.weight_hh_l0.detach().chunk(3)
        >>> torch.allclose(w_r @ w_r.T, torch.eye(10), atol=1e-5)
        True

    Arguments:
        module: a cell, a layer, or any module that holds some. Every ``weight_hh`` with two axes is taken, in as many
            blocks of rows as the cell has ``gates``.
        gain: the factor.

    Returns:
        The module.

    Raises:
        ValueError: if there is no recurrent matrix inside.

    Paper: Saxe, McClelland and Ganguli, "Exact solutions to the nonlinear dynamics of learning in deep linear neural
    networks", 2014, arXiv:1312.6120.
    """
    found = 0
    for cell in _cells(module):
        weight = getattr(cell, "weight_hh", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            found += 1
            for block in weight.detach().chunk(max(len(cell.gates), 1)):
                block.copy_(nn.init.orthogonal_(torch.empty_like(block), gain))
    if not found:
        raise ValueError(f"orthogonal_ found no weight_hh in {type(module).__name__}.")
    return module


def gate_bias_(module: Module, gate: str, value: float | Tensor) -> Module:
    """Set the bias of one gate, where its two biases add up to ``value``.

    Example:
        >>> import fusecell as fc
        >>> cell = fc.init.gate_bias_(fc.GRUCell(5, 10), "z", 2.0)
        >>> (cell.bias_ih + cell.bias_hh)[10:20].mean()
        tensor(2., grad_fn=<MeanBackward0>)

    Arguments:
        module: a cell, a layer, or any module that holds some; cells without such a gate stay as they are.
        gate: one of the cell's ``gates``, or what follows ``bias_`` in the name of a parameter.
        value: a number, or (hidden_size,).

    Returns:
        The module.

    Raises:
        ValueError: if no cell inside has a bias for such a gate.
    """
    known: set[str] = set()
    found = False
    for cell in _cells(module):
        known.update(cell.gates)
        found |= _set_bias(cell, gate, value)
    if not found:
        raise ValueError(
            f"gate_bias_ found no bias of a gate {gate!r} in {type(module).__name__}; its gates are "
            f"{', '.join(sorted(known)) or 'unnamed'}. A cell says in `gates` what the blocks of rows of its weight_ih "
            "and bias_ih belong to."
        )
    return module


def forget_bias_(module: Module, value: float = 1.0) -> Module:
    r"""Let the gates that keep the state begin open: :math:`\sigma(1) = 0.73`, where a bias of 0 would forget half.

    Example:
        >>> import fusecell as fc
        >>> model = fc.init.forget_bias_(fc.LSTM(5, 10, num_layers=2), 1.0)

    Arguments:
        module: a cell, a layer, or any module that holds some; each cell names its gate by ``keeps``, or, where one
            gate lets the new in and the old out, by ``updates``, which gets the negative.
        value: the bias.

    Returns:
        The module.

    Raises:
        ValueError: if no cell inside names such a gate, or none has a bias.

    Paper: Jozefowicz, Zaremba and Sutskever, "An empirical exploration of recurrent network architectures", 2015.
    """
    found = False
    for cell in _cells(module):
        found |= _set_bias(cell, cell.keeps, value) if cell.keeps else _set_bias(cell, cell.updates, -value)
    if not found:
        raise ValueError(_NO_GATE.format("forget_bias_", type(module).__name__))
    return module


def chrono_(module: Module, longest: int) -> Module:
    r"""Spread the units' memory over time spans up to ``longest`` steps.

    .. math:: b_\mathrm{keep} \sim \log \mathcal{U}(1, \mathrm{longest} - 1), \quad b_\mathrm{update} = -b_\mathrm{keep}

    Example:
        >>> import fusecell as fc
        >>> lstm = fc.init.chrono_(fc.LSTM(5, 10), longest=500)

    Arguments:
        module: a cell, a layer, or any module that holds some.
        longest: the longest dependency expected, in steps, above 2.

    Returns:
        The module.

    Raises:
        ValueError: for a ``longest`` of 2 or less; if no cell inside names a gate that keeps or updates its state.

    Paper: Tallec and Ollivier, "Can recurrent neural networks warp time?", 2018, arXiv:1804.11188.
    """
    if not longest > 2:
        raise ValueError(f"chrono_ needs a longest dependency of more than 2 steps, got {longest!r}.")
    found = False
    for cell in _cells(module):
        spread = torch.empty(cell.hidden_size).uniform_(1, longest - 1).log()
        found |= bool(cell.keeps) and _set_bias(cell, cell.keeps, spread)
        found |= bool(cell.updates) and _set_bias(cell, cell.updates, -spread)
    if not found:
        raise ValueError(_NO_GATE.format("chrono_", type(module).__name__))
    return module


_NO_GATE = (
    "{} found no gate with a bias in {}. A cell names its gates in `gates`, the one that keeps its state in `keeps` "
    "and the one that renews it in `updates`."
)


def _cells(module: nn.Module) -> Iterator[Cell]:
    """The cells inside; a drop-in layer's are views of its weights."""
    for part in module.modules():
        if isinstance(part, Cell):
            yield part
        elif isinstance(part, GRU | LSTM | RNN):
            yield from (cell for *_, cell in part.leaf_cells())


def _set_bias(cell: Cell, gate: str, value: float | Tensor) -> bool:
    """Set one gate's bias; whether there was one."""
    size = cell.hidden_size
    alone = getattr(cell, f"bias_{gate}", None)
    if isinstance(alone, Tensor):
        with torch.no_grad():
            alone.copy_(torch.as_tensor(value).expand_as(alone))
        return True
    if gate not in cell.gates:
        return False
    place = slice(cell.gates.index(gate) * size, (cell.gates.index(gate) + 1) * size)
    first, second = (_block(cell, names, place) for names in (_FIRST, _SECOND))
    if first is None:
        return False
    first.copy_(torch.as_tensor(value).expand_as(first))
    if second is not None:
        second.zero_()
    return True


def _block(cell: Cell, names: tuple[str, ...], place: slice) -> Tensor | None:
    for name in names:
        found: object = cell
        for part in name.split("."):
            found = getattr(found, part, None)
        if isinstance(found, Tensor) and found.shape[0] >= place.stop:
            return found.detach()[place]
    return None
