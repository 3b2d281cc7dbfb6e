"""Initial values for recurrent weights, on any cell or layer; each function changes its module in place."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.cell_tree import iter_cells

__all__ = ["chrono_", "forget_bias_", "gate_bias_", "orthogonal_"]

Module = TypeVar("Module", bound=nn.Module)

# Attributes that may hold a bias of the gates: the first that exists gets the value, the second one becomes 0.
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
        module: a cell, a layer, or any module that contains some. Each 2-D ``weight_hh`` is split into as many blocks
            of rows as the cell has ``gates``, and each block is made orthogonal.
        gain: a factor on the matrix.

    Returns:
        The module.

    Raises:
        ValueError: if there is no recurrent matrix inside.

    Paper: Saxe, McClelland and Ganguli, "Exact solutions to the nonlinear dynamics of learning in deep linear neural
    networks", 2014, arXiv:1312.6120.
    """
    changed = False
    for cell in iter_cells(module):
        weight = getattr(cell, "weight_hh", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            changed = True
            # One matrix per gate: orthogonal blocks together would not be orthogonal.
            for block in weight.detach().chunk(max(len(_gates(cell)), 1)):
                block.copy_(nn.init.orthogonal_(torch.empty_like(block), gain))
    if not changed:
        raise ValueError(
            f"orthogonal_ found no weight_hh in {type(module).__name__}. It needs a cell, or a layer of cells, whose "
            "recurrent matrix is called weight_hh."
        )
    return module


def gate_bias_(module: Module, gate: str, value: float | Tensor) -> Module:
    """Set the bias of one gate; where a cell has two biases, their sum becomes ``value``.

    Example:
        >>> import fusecell as fc
        >>> cell = fc.init.gate_bias_(fc.GRUCell(5, 10), "z", 2.0)
        >>> (cell.bias_ih + cell.bias_hh)[10:20].mean()
        tensor(2., grad_fn=<MeanBackward0>)

    Arguments:
        module: a cell, a layer, or any module that contains some; cells without such a gate stay as they are.
        gate: one of the cell's ``gates``, or the ``z`` of a parameter called ``bias_z``.
        value: a number, or a tensor of shape (hidden_size,).

    Returns:
        The module.

    Raises:
        ValueError: if no cell inside has a bias for such a gate.
    """
    gates: set[str] = set()
    changed = False
    for cell in iter_cells(module):
        gates.update(_gates(cell))
        changed |= _set_bias(cell, gate, value)
    if not changed:
        raise ValueError(
            f"gate_bias_ found no bias of a gate {gate!r} in {type(module).__name__}; its gates are "
            f"{', '.join(sorted(gates)) or 'unnamed'}. A cell says in `gates` what the blocks of rows of its weight_ih "
            "and bias_ih belong to."
        )
    return module


def forget_bias_(module: Module, value: float = 1.0) -> Module:
    r"""Set the bias of the gate that keeps the state, so that training starts with little forgetting.

    A bias of 1 keeps :math:`\sigma(1) = 0.73` of the state in a step, a bias of 0 half of it.

    Example:
        >>> import fusecell as fc
        >>> model = fc.init.forget_bias_(fc.LSTM(5, 10, num_layers=2), 1.0)

    Arguments:
        module: a cell, a layer, or any module that contains some. The gate is the one that a cell names in ``keeps``;
            where there is none, the one in ``updates`` gets the negative value.
        value: the bias.

    Returns:
        The module.

    Raises:
        ValueError: if no cell inside names such a gate, or none has a bias.

    Paper: Jozefowicz, Zaremba and Sutskever, "An empirical exploration of recurrent network architectures", 2015.
    """
    changed = False
    for cell in iter_cells(module):
        keeps, updates = _named(cell.keeps), _named(cell.updates)
        changed |= _set_bias(cell, keeps, value) if keeps else _set_bias(cell, updates, -value)
    if not changed:
        raise ValueError(_NO_GATE.format("forget_bias_", type(module).__name__))
    return module


def chrono_(module: Module, longest: int) -> Module:
    r"""Draw the gates' biases so that the units' memories last from 1 to ``longest`` steps.

    .. math:: b_\mathrm{keep} \sim \log \mathcal{U}(1, \mathrm{longest} - 1), \quad b_\mathrm{update} = -b_\mathrm{keep}

    Example:
        >>> import fusecell as fc
        >>> lstm = fc.init.chrono_(fc.LSTM(5, 10), longest=500)

    Arguments:
        module: a cell, a layer, or any module that contains some.
        longest: the longest dependency expected, in steps, above 2.

    Returns:
        The module.

    Raises:
        ValueError: for a ``longest`` of 2 or less; if no cell inside names a gate that keeps or updates its state.

    Paper: Tallec and Ollivier, "Can recurrent neural networks warp time?", 2018, arXiv:1804.11188.
    """
    if not longest > 2:
        raise ValueError(f"chrono_ needs a longest dependency of more than 2 steps, got {longest!r}.")
    changed = False
    for cell in iter_cells(module):
        # A gate at sigmoid(log(t)) keeps t / (t + 1) of the state in a step: its memory lasts about t steps.
        spread = torch.empty(cell.hidden_size).uniform_(1, longest - 1).log()
        keeps, updates = _named(cell.keeps), _named(cell.updates)
        changed |= bool(keeps) and _set_bias(cell, keeps, spread)
        changed |= bool(updates) and _set_bias(cell, updates, -spread)
    if not changed:
        raise ValueError(_NO_GATE.format("chrono_", type(module).__name__))
    return module


_NO_GATE = (
    "{} found no gate with a bias in {}. A cell names its gates in `gates`, the one that keeps its state in `keeps` "
    "and the one that renews it in `updates`."
)


def _gates(cell: Cell) -> tuple[str, ...]:
    """Return the names of a cell's gates; none where ``gates`` is a submodule."""
    return tuple(cell.gates) if isinstance(cell.gates, tuple | list) else ()


def _named(gate: object) -> str:
    """Return a gate's name; "" where ``keeps`` or ``updates`` is a submodule."""
    return gate if isinstance(gate, str) else ""


def _set_bias(cell: Cell, gate: str, value: float | Tensor) -> bool:
    """Set one gate's bias; return whether the cell has one."""
    size = cell.hidden_size
    # A parameter of this gate alone, as FastGRNNCell has.
    bias = getattr(cell, f"bias_{gate}", None)
    if isinstance(bias, Tensor):
        with torch.no_grad():
            bias.copy_(torch.as_tensor(value).expand_as(bias))
        return True
    gates = _gates(cell)
    if gate not in gates:
        return False
    rows = slice(gates.index(gate) * size, (gates.index(gate) + 1) * size)
    first, second = (_block(cell, names, rows) for names in (_FIRST, _SECOND))
    if first is None:
        return False
    first.copy_(torch.as_tensor(value).expand_as(first))
    if second is not None:
        second.zero_()
    return True


def _block(cell: Cell, names: tuple[str, ...], rows: slice) -> Tensor | None:
    """Return ``rows`` of the first of the named biases that has them, without autograd's history."""
    for name in names:
        bias: object = cell
        for part in name.split("."):
            bias = getattr(bias, part, None)
        # LayerNormGRUCell normalises its candidate apart: the bias of its gates ends before the candidate's rows.
        if isinstance(bias, Tensor) and bias.shape[0] >= rows.stop:
            return bias.detach()[rows]
    return None
