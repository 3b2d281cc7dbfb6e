"""Cells of ONNX's recurrent nodes with all that these may have: other activations, a clip, peepholes, coupled gates.

What torch.nn's layers compute is loaded as such; these are for the rest. The equations are those of the operators'
documentation, https://onnx.ai/onnx/operators/onnx__GRU.html, onnx__LSTM.html and onnx__RNN.html.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusecell.cell import Cell
from fusecell.execution.options import State

__all__ = ["NODE_CELLS", "Activation", "NodeCell", "activations_of"]

_FUNCTIONS: Mapping[str, Callable[[Tensor, float, float], Tensor]] = {
    "relu": lambda x, alpha, beta: torch.relu(x),
    "tanh": lambda x, alpha, beta: torch.tanh(x),
    "sigmoid": lambda x, alpha, beta: torch.sigmoid(x),
    "affine": lambda x, alpha, beta: alpha * x + beta,
    "leakyrelu": lambda x, alpha, beta: functional.leaky_relu(x, alpha),
    "thresholdedrelu": lambda x, alpha, beta: torch.where(x > alpha, x, 0.0),
    "scaledtanh": lambda x, alpha, beta: alpha * torch.tanh(beta * x),
    "hardsigmoid": lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1),
    "elu": lambda x, alpha, beta: functional.elu(x, alpha),
    "softsign": lambda x, alpha, beta: functional.softsign(x),
    "softplus": lambda x, alpha, beta: functional.softplus(x),
}
_ALPHA = {
    "affine": 1.0, "leakyrelu": 0.01, "thresholdedrelu": 1.0, "scaledtanh": 1.0, "hardsigmoid": 0.2, "elu": 1.0
}  # fmt: skip
"""The functions that take an alpha, and its default."""
_BETA = {"affine": 0.0, "scaledtanh": 1.0, "hardsigmoid": 0.5}


@dataclass(frozen=True)
class Activation:
    """An activation function of a node.

    Arguments:
        name: ONNX's, in lower case.
        alpha, beta: its numbers, where it has any.
    """

    name: str
    alpha: float = 0.0
    beta: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        return _FUNCTIONS[self.name](x, self.alpha, self.beta)

    def __str__(self) -> str:
        numbers = [str(each) for table, each in ((_ALPHA, self.alpha), (_BETA, self.beta)) if self.name in table]
        return f"{self.name}({', '.join(numbers)})" if numbers else self.name


def activations_of(names: Sequence[str], alphas: Sequence[float], betas: Sequence[float]) -> list[Activation]:
    """Return a node's activations; the numbers are consumed by those that take some, in order.

    Raises:
        ValueError: for a name that ONNX doesn't have.
    """
    left_alphas, left_betas = iter(alphas), iter(betas)
    result = []
    for name in names:
        lower = name.lower()
        if lower not in _FUNCTIONS:
            raise ValueError(f"the activation {name!r}, which is none of {', '.join(_FUNCTIONS)}")
        alpha = next(left_alphas, _ALPHA[lower]) if lower in _ALPHA else 0.0
        beta = next(left_betas, _BETA[lower]) if lower in _BETA else 0.0
        result.append(Activation(lower, float(alpha), float(beta)))
    return result


class NodeCell(Cell):
    """Base class: the weights of one direction of a node, gates in ONNX's order.

    Arguments:
        input_size, hidden_size: features of x and of h.
        activations: as many as the node has in a direction.
        clip: the bound of what goes into a gate's activation; None for none.
        dtype: of the weights, which are zeros until they are copied.
        options: what else the node has, attributes of the cell.

    Attributes:
        weight_ih, weight_hh, bias_ih, bias_hh: W, R and both halves of B.
    """

    count: ClassVar[int]
    """The number of gates."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        activations: Sequence[Activation],
        clip: float | None,
        dtype: torch.dtype,
        options: Mapping[str, bool],
    ) -> None:
        super().__init__(input_size, hidden_size)
        rows = self.count * hidden_size
        self.weight_ih = nn.Parameter(torch.zeros(rows, input_size, dtype=dtype))
        self.weight_hh = nn.Parameter(torch.zeros(rows, hidden_size, dtype=dtype))
        self.bias_ih = nn.Parameter(torch.zeros(rows, dtype=dtype))
        self.bias_hh = nn.Parameter(torch.zeros(rows, dtype=dtype))
        self.activations, self.clip = tuple(activations), clip
        self.options = dict(options)

    def apply_gate(self, place: int, x: Tensor) -> Tensor:
        """Apply an activation, by its place among the node's, to what is within the clip."""
        x = x if self.clip is None else x.clamp(-self.clip, self.clip)
        return self.activations[place](x)

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"activations=[{', '.join(map(str, self.activations))}]"]
        parts += [] if self.clip is None else [f"clip={self.clip}"]
        return ", ".join([*parts, *(f"{name}={value}" for name, value in self.options.items())])


class NodeRNNCell(NodeCell):
    r"""A step of ONNX's RNN.

    .. math:: h' = f(W x + b_W + R h + b_R)
    """

    count = 1

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        (h,) = state
        h = self.apply_gate(
            0, functional.linear(x, self.weight_ih, self.bias_ih) + functional.linear(h, self.weight_hh, self.bias_hh)
        )
        return h, (h,)


class NodeGRUCell(NodeCell):
    r"""A step of ONNX's GRU; with ``linear_before_reset`` r multiplies R_n h + b_{Rn} rather than h.

    .. math::
        z, r &= f(W_{z, r} x + R_{z, r} h + b) \\
        n &= g(W_n x + b_{Wn} + R_n (r \odot h) + b_{Rn}) \\
        h' &= (1 - z) \odot n + z \odot h
    """

    count = 3

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        (h,) = state
        size = self.hidden_size
        of_x = functional.linear(x, self.weight_ih, self.bias_ih)
        x_zr, x_n = of_x[:, : 2 * size], of_x[:, 2 * size :]
        zr = self.apply_gate(0, x_zr + functional.linear(h, self.weight_hh[: 2 * size], self.bias_hh[: 2 * size]))
        z, r = zr.chunk(2, -1)
        weight, bias = self.weight_hh[2 * size :], self.bias_hh[2 * size :]
        if self.options["linear_before_reset"]:
            h_n = r * functional.linear(h, weight, bias)
        else:
            h_n = functional.linear(r * h, weight, bias)
        n = self.apply_gate(1, x_n + h_n)
        h = (1 - z) * n + z * h
        return h, (h,)


class NodeLSTMCell(NodeCell):
    r"""A step of ONNX's LSTM with peepholes; with ``input_forget`` f is 1 - i.

    .. math::
        i, f &= f(W_{i, f} x + R_{i, f} h + b + P_{i, f} \odot c) \\
        c' &= f \odot c + i \odot g(W_c x + R_c h + b) \\
        o &= f(W_o x + R_o h + b + P_o \odot c') \\
        h' &= o \odot h(c')

    Attributes:
        peepholes: P of i, o and f, (3 * hidden_size,).
    """

    count = 4
    states = ("h", "c")

    def __init__(self, input_size: int, hidden_size: int, *args: Any) -> None:
        super().__init__(input_size, hidden_size, *args)
        self.peepholes = nn.Parameter(torch.zeros(3 * hidden_size, dtype=self.weight_ih.dtype))

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        h, c = state
        gates = functional.linear(x, self.weight_ih, self.bias_ih) + functional.linear(h, self.weight_hh, self.bias_hh)
        i, o, f, g = gates.chunk(4, -1)
        p_i, p_o, p_f = self.peepholes.chunk(3)
        i = self.apply_gate(0, i + p_i * c)
        f = 1 - i if self.options["input_forget"] else self.apply_gate(0, f + p_f * c)
        c = f * c + i * self.apply_gate(1, g)
        h = self.apply_gate(0, o + p_o * c) * self.activations[2](c)  # unclipped, as in ONNX Runtime
        return h, (h, c)


NODE_CELLS: Mapping[str, type[NodeCell]] = {"RNN": NodeRNNCell, "GRU": NodeGRUCell, "LSTM": NodeLSTMCell}
