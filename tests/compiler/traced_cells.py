"""Cells for the tracer's tests, and the comparison of their graphs with torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusecell as fc
from fusecell.compiler.frontend import Traced, trace
from fusecell.compiler.ir.interpreter import interpret
from fusecell.compiler.transforms.partition import ForwardBackward, partition

OUTSIDE = torch.rand(6, dtype=torch.float64)
Body = Callable[[Any, Tensor, Tensor], Tensor]
Function = Callable[[Tensor], Tensor]


class BodyCell(fc.Cell):
    """A cell whose step is a function of (cell, x, h), with weights of many shapes to use in it."""

    def __init__(self, body: Body) -> None:
        super().__init__(4, 6)
        self.body = body
        self.inp = nn.Linear(4, 6)
        self.rec = nn.Linear(6, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.gru, self.lstm, self.elman = nn.GRUCell(6, 6), nn.LSTMCell(6, 6), nn.RNNCell(4, 6)
        self.layer = nn.LSTM(6, 6)
        self.held = {"gain": torch.rand(6), "taps": [torch.rand(6), nn.Parameter(torch.rand(6))]}
        for name, shape in {
            "vector": (6,),
            "scalar": (),
            "one": (1,),
            "line": (1, 6),
            "square": (6, 6),
            "tall": (18, 6),
            "long": (12,),
            "table": (3, 6),
            "pair": (2,),
        }.items():
            self.register_parameter(name, nn.Parameter(torch.rand(shape) * 0.8 - 0.3))
        self.register_buffer("mask", torch.rand(6, 6) > 0.4)
        self.register_buffer("flags", torch.tensor([True, False, True, True, False, True]))
        self.register_buffer("count", torch.tensor(3))

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        (h,) = state
        y = self.body(self, x, h)
        return y, (y,)


def both(cell: BodyCell, x: Tensor, h: Tensor) -> Tensor:
    """Return the sum of products that most steps begin with."""
    total: Tensor = cell.inp(x) + cell.rec(h)
    return total


def traced(cell: fc.Cell, **options: Any) -> Traced:
    """The trace of a cell of one input, which must succeed."""
    step_trace = trace(
        cell, [(cell.input_size,)], options.pop("dtype", torch.float64), **{"gradients": True, **options}
    )
    assert isinstance(step_trace, Traced), step_trace
    return step_trace


def partitioned(step_trace: Traced) -> ForwardBackward:
    """The forward and backward graphs for the gradients of all inputs and weights."""
    labels = [label for label in step_trace.graph.outputs if label.startswith(("grad.input.", "grad.weight."))]
    return partition(step_trace.graph, labels)


def values_of(step_trace: Traced, cell: fc.Cell, leaves: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The values of a graph's leaves: the cell's weights, and ``given``, flattened."""
    names = [step_trace.graph[index].name for index in step_trace.graph.leaves("weight")]
    weights = zip(names, step_trace.weights.values(cell), strict=True)
    return {name: value.detach() for name, value in weights} | {
        name: value.detach().reshape(len(value), -1) for name, value in leaves
    }


def compare(cell: fc.Cell, shapes: Sequence[tuple[int, ...]] | None = None, rows: int = 3) -> Traced:
    """Hold the graph of a float64 cell, forward and backward, against torch to 1e-12."""
    shapes = shapes or [(cell.input_size,)]
    step_trace = trace(cell, shapes, torch.float64, gradients=True)
    assert isinstance(step_trace, Traced), step_trace
    x = [torch.randn(rows, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    state = [torch.randn(rows, size, dtype=torch.float64, requires_grad=True) for size in cell.state_sizes]
    output, after = cell.step(tuple(x) if len(x) > 1 else x[0], tuple(state))
    seeds = [torch.randn_like(value) for value in (output, *after)]
    labels = ["grad.output", *(f"grad.{name}" for name in cell.states)]
    leaves = [
        *zip(cell.inputs, x, strict=True),
        *zip(cell.states, state, strict=True),
        *zip(labels, seeds, strict=True),
    ]
    results = interpret(step_trace.graph, values_of(step_trace, cell, leaves))
    close(results["output"], output)
    for name, value in zip(cell.states, after, strict=True):
        close(results[f"state.{name}"], value)
    parameters = [value for value in cell.parameters() if value.requires_grad]
    loss = sum((value * seed).sum() for value, seed in zip((output, *after), seeds, strict=True))
    gradients = torch.autograd.grad(loss, [*x, *state, *parameters], allow_unused=True)
    names = [f"grad.input.{name}" for name in cell.inputs] + [f"grad.state.{name}" for name in cell.states]
    for name, gradient in zip(names, gradients, strict=False):
        assert (name in results) == (gradient is not None), name
        if gradient is not None:
            close(results[name], gradient.reshape(rows, -1))
    for gradient, expected in zip(
        _through(step_trace, cell, results, parameters), gradients[len(names) :], strict=True
    ):
        close(torch.zeros(()) if gradient is None else gradient, torch.zeros(()) if expected is None else expected)
    return step_trace


def _through(
    step_trace: Traced, cell: fc.Cell, results: dict[str, Tensor], parameters: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """The gradients of the weight leaves carried through the prologue to the parameters."""
    names = [step_trace.graph[index].name for index in step_trace.graph.leaves("weight")]
    pairs = [
        (value, results[f"grad.weight.{name}"])
        for name, value in zip(names, step_trace.weights.values(cell), strict=True)
        if f"grad.weight.{name}" in results and value.requires_grad
    ]
    if not pairs:
        return [None] * len(parameters)
    return torch.autograd.grad(
        [value for value, _ in pairs], parameters, [gradient for _, gradient in pairs], allow_unused=True
    )


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=1e-12, atol=1e-12, equal_nan=True)


def _square(z: Tensor) -> Tensor:
    return z.view(-1, 2, 3)


def _changed_while_viewed(z: Tensor) -> Tensor:
    doubled = z * 2
    part, whole = doubled[:, :3], doubled.view(-1, 2, 3)
    doubled.add_(1)
    return torch.cat([part, part], 1) + whole.flatten(1)


def _part_changed(z: Tensor) -> Tensor:
    doubled = z * 2
    halves = doubled.view(-1, 2, 3)
    doubled[:, :2] += 1
    doubled[:, 1::2] = z[:, :3] * z[:, 3:]
    halves[z[:, :6].view(-1, 2, 3) < -0.3] = 0.25
    return doubled * halves.flatten(1)


# What is done to an input of elements of either sign; every rule of the tables is met by one of these or of WEIGHTS.
FUNCTIONS: dict[str, Function] = {
    **{
        name: getattr(F, name)
        for name in [
            "sigmoid",
            "tanh",
            "relu",
            "leaky_relu",
            "elu",
            "selu",
            "celu",
            "gelu",
            "silu",
            "softplus",
            "hardtanh",
            "hardsigmoid",
            "hardswish",
            "mish",
            "softsign",
            "logsigmoid",
            "tanhshrink",
            "hardshrink",
            "softshrink",
            "relu6",
        ]
    },
    **{
        name: getattr(torch, name)
        for name in [
            "exp",
            "sin",
            "cos",
            "abs",
            "neg",
            "sign",
            "tan",
            "exp2",
            "expm1",
            "erf",
            "erfc",
            "floor",
            "ceil",
            "trunc",
            "square",
        ]
    },
    **{
        name: lambda z, name=name: getattr(torch, name)(z.abs() + 0.5)
        for name in ["log", "log1p", "sqrt", "rsqrt", "reciprocal", "log2", "log10"]
    },
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "softplus_sharp": lambda z: F.softplus(z, 2.0, 1.0),
    "elu_small": lambda z: F.elu(z, 0.5),
    "elu_in_place": lambda z: F.elu(z * 1, 0.5, inplace=True),
    "relu_in_place": lambda z: torch.relu_(z * 1),
    "threshold": lambda z: F.threshold(z, 0.1, 0.2),
    "powers": lambda z: (z.abs() + 0.1) ** 2.5 + z**3 + z**2 + (z.abs() + 0.2) ** -0.5 + (z.abs() + 1) ** -2 + 2**z,
    "power_of_itself": lambda z: (z.abs() + 0.1) ** (z * z),
    "limits": lambda z: torch.maximum(z, z * 0.5) + torch.minimum(z, -z) + z.clamp(-0.3, 0.4) + z.clamp(min=0),
    "limits_of_tensors": lambda z: torch.clamp(z, z * 0.5, z.abs()) + torch.clamp_max(z, 0.2),
    "where": lambda z: torch.where(z > 0.0, z, 0.0) + torch.where((z > 0.1) & ~(z < 0.3) | (z == 0), z * 2, z),
    "masked_fill": lambda z: z.masked_fill(z > 0.2, 1.5) + torch.masked_fill(z, z <= 0, 0),
    "logic": lambda z: torch.logical_xor(z > 0, z > 0.5).to(z.dtype) * z + (z >= 0) * z + ((z != 0) ^ (z > 1)) * z,
    "logical": lambda z: torch.logical_and(z > 0, z < 1) * z + torch.logical_or(z > 1, torch.logical_not(z > 0)) * z,
    "lerp": lambda z: torch.lerp(z, z * 2, torch.sigmoid(z)) + torch.lerp(z, -z, 0.3) + torch.lerp(z, -z, 0.7),
    "fused": lambda z: torch.addcmul(z, z, z, value=0.5) + torch.addcdiv(z, z, z.abs() + 1, value=2.0),
    "numbers": lambda z: (
        1 - z + torch.sub(z, z * z, alpha=3) + torch.add(z, z * z, alpha=0.3) + 1 / (z * z + 1) + z / 3
    ),
    "truncated": lambda z: torch.div(z, 0.3, rounding_mode="trunc") * z,
    "glu": lambda z: F.glu(torch.cat([z, z * 2], -1)),
    "not_finite": lambda z: torch.nan_to_num(z, 0.0, 1.0, -1.0) + torch.isnan(z) * z + torch.isinf(z) * z,
    **{
        name: lambda z, name=name: z * getattr(z, name)(-1, keepdim=True)
        for name in ["sum", "mean", "var", "std", "amax", "amin", "logsumexp"]
    },
    "softmax": lambda z: z.softmax(-1),
    "log_softmax": lambda z: z.log_softmax(-1),
    "logsumexp_flat": lambda z: z + z.logsumexp(-1)[:, None],
    "var_biased": lambda z: z * z.var(-1, keepdim=True, unbiased=False),
    "var_mean": lambda z: z * torch.var_mean(z, -1, keepdim=True)[0] + torch.var_mean(z, -1, keepdim=True)[1],
    "std_mean": lambda z: z * torch.std_mean(z, -1, keepdim=True)[0] + torch.std_mean(z, -1, keepdim=True)[1],
    "norms": lambda z: F.normalize(z, dim=-1) + z.norm(dim=-1, keepdim=True) + _norm(z, 1) + _norm(z, 3),
    "norm_of_order_zero": lambda z: z * _norm(torch.relu(z), 0.0) + z,
    "norm_of_order_infinity": lambda z: z * _norm(z, math.inf) + z.detach() * _norm(z, -math.inf),
    "max": lambda z: z * z.detach().max(-1, keepdim=True)[0] - z.detach().min(-1, keepdim=True)[0],
    "rms_norm": lambda z: F.rms_norm(z, (6,)),
    "layer_norm": lambda z: F.layer_norm(z, (6,)),
    "groups": lambda z: F.layer_norm(_square(z), (3,)).view(-1, 6) + _square(z).softmax(1).flatten(1),
    "group_sums": lambda z: _square(z).sum(1).repeat(1, 2) + z.view(-1, 3, 2).amax(2).repeat(1, 2),
    "unflatten": lambda z: z.unflatten(1, (3, 2)).softmax(-1).flatten(1),
    "cat_and_stack": lambda z: torch.cat([z[:, 3:], z[:, :3]], 1) + torch.stack([z[:, :3], z[:, 3:]], 2).flatten(1),
    "roll_and_flip": lambda z: torch.roll(z, 1, 1) + z.flip(1),
    "pad": lambda z: F.pad(z[:, 1:-1], (1, 1)) + F.pad(z, (0, 3))[:, 3:],
    "select": lambda z: z * z[:, 0:1] + z * z[:, 2, None] + z[:, ::2].repeat(1, 2),
    "expand": lambda z: z[:, :1].expand(-1, 6) * z[:, 1:2].expand_as(z),
    "transpose": lambda z: _square(z).transpose(1, 2).reshape(-1, 6) + z.t().t() + _square(z).mT.tanh().flatten(1),
    "unbind": lambda z: torch.stack(z.unbind(1)[::-1], 1),
    "chunk": lambda z: torch.cat([z.chunk(2, 1)[1] * z.chunk(2, 1)[0], z.split([2, 1, 3], 1)[2]], 1),
    "filled": lambda z: z + torch.zeros_like(z) + torch.ones_like(z) * 2 + z.new_full((len(z), 6), 3.0),
    "filled_in_another_dtype": lambda z: (
        z * torch.full((6,), 0.1, dtype=torch.float32) + z * torch.full((len(z), 6), 1.7, dtype=torch.int64)
    ),
    "sums_of_truth_values": lambda z: z * ((z > 0) + (z > 0.3)) + z * ((z > 0) * (z < 0.5)),
    "factories": lambda z: z * torch.ones(len(z), 1).double() + torch.tensor(2.0) * z + torch.zeros(6).double(),
    "in_place": lambda z: (z * 2).add_(1).mul_(z).clamp_(-1, 1),
    "a_part_in_place": _part_changed,
    "in_place_while_viewed": _changed_while_viewed,
    "spelled_out": lambda z: z[:, [4, 0, 1, 1, 5, 2]] * torch.tensor([1.0, 2, 3, 4, 5, 6]).double() + OUTSIDE * z,
    "detached": lambda z: z * z.detach(),
    "small_products": lambda z: torch.bmm(_square(z), z.view(-1, 3, 2)).flatten(1).repeat(1, 2)[:, :6],
    "outer_products": lambda z: (z[:, :3, None] * z[:, None, :2]).flatten(1),
    "cosine_similarity": lambda z: z * F.cosine_similarity(z[:, :3], z[:, 3:], dim=1)[:, None],
}


def _norm(z: Tensor, order: float) -> Tensor:
    return torch.linalg.vector_norm(z, ord=order, dim=-1, keepdim=True)


def _frozen_double(cell: Any) -> Tensor:
    with torch.no_grad():
        doubled: Tensor = cell.vector * 2
    return doubled


def _built(cell: Any) -> Tensor:
    matrix = torch.zeros(6, 6, dtype=torch.float64)
    matrix[:3] = cell.square[:3] * 2
    return matrix


WEIGHTS: dict[str, Body] = {
    "vectors": lambda c, x, h: both(c, x, h) * c.vector + c.line * h + c.scalar * h + c.one * h,
    "parts_of_a_vector": lambda c, x, h: c.long[:6] * h + c.long[6:] + c.long.chunk(2)[0] + c.long[3] * h,
    "computed": lambda c, x, h: torch.tanh(
        both(c, x, h) + F.linear(h, c.square - c.square.t()) + h @ c.square + F.linear(h, F.relu(c.square) * c.mask)
    ),
    "tied_and_transposed": lambda c, x, h: torch.tanh(h @ c.square + h @ c.square.t() + c.rec(h) * c.rec(h * h)),
    "on_the_left": lambda c, x, h: (c.square @ h.t()).t() + x @ c.inp.weight.t(),
    "flags": lambda c, x, h: torch.where(c.flags, h, both(c, x, h)) + c.flags * h,
    "flags_connected": lambda c, x, h: torch.where(c.flags | (h > 0) & ~c.flags, h, both(c, x, h)),
    "whole_number": lambda c, x, h: h / c.count,
    "rows": lambda c, x, h: sum(torch.tanh(F.linear(h, w)) for w in c.tall.chunk(3)) + F.linear(h, c.tall[2:8]),
    "columns": lambda c, x, h: F.linear(h[:, :3], c.square[:, :3]) + h[:, 2:] @ c.tall[:4],
    "addmm": lambda c, x, h: torch.addmm(c.vector, h, c.square, beta=0.5, alpha=2.0) + torch.addmm(h, h, c.square),
    "mv": lambda c, x, h: h * torch.mv(h, c.vector)[:, None] + h * (h @ c.vector).unsqueeze(1),
    "heads": lambda c, x, h: (h[:, None, :] * c.table).sum(1) + (h.view(-1, 3, 2) * c.pair).flatten(1),
    "layer_norm": lambda c, x, h: c.norm(both(c, x, h)),
    "rms_norm": lambda c, x, h: F.rms_norm(both(c, x, h), (6,), c.vector),
    "powers": lambda c, x, h: (h.abs() + 0.1) ** c.vector + (h * h + 1) ** c.one,
    "gates": lambda c, x, h: torch.sigmoid(c.vector) * h + (1 - torch.sigmoid(c.scalar)) * both(c, x, h),
    "prelu": lambda c, x, h: F.prelu(both(c, x, h), c.one) + F.prelu(h, c.vector),
    "division": lambda c, x, h: h / (c.vector + 2) + c.vector / (h * h + 1),
    "einsum": lambda c, x, h: torch.einsum("ni,oi->no", h, c.square) + torch.einsum("ni,io->no", h, c.square),
    "matrix_exp": lambda c, x, h: h @ torch.matrix_exp(c.square - c.square.T),
    "qr": lambda c, x, h: h @ torch.linalg.qr(c.square)[0],
    "products_with_zeros": lambda c, x, h: h + torch.zeros_like(h) @ torch.tanh(c.square * c.mask),
    "row_and_whole": lambda c, x, h: h * c.square[0] + c.square[:, 1] * h + h @ c.square,
    "identity": lambda c, x, h: F.linear(h, c.square - torch.eye(6, dtype=h.dtype) * c.scalar),
    "built_in_place": lambda c, x, h: F.linear(h, _built(c)),
    "detached": lambda c, x, h: F.linear(h, c.square.detach() * 2 + c.square) + c.vector.detach() * h,
    "without_gradient": lambda c, x, h: both(c, x, h) + _frozen_double(c) * h,
    "joined": lambda c, x, h: F.linear(torch.cat([x, h], 1), torch.cat([c.inp.weight, c.square], 1)),
    "joined_to_rows": lambda c, x, h: torch.cat([h[:, :3], c.vector[:3].expand(len(h), 3)], 1),
    "spread": lambda c, x, h: c.vector.expand(len(h), -1) * 2 + c.vector.expand_as(h) * h,
    "alone": lambda c, x, h: c.vector.expand_as(h),
    "nothing": lambda c, x, h: h,
    "lerp": lambda c, x, h: torch.lerp(h, both(c, x, h), torch.sigmoid(c.vector)),
    "limits": lambda c, x, h: (
        torch.where(h > c.vector, h, c.vector) + torch.maximum(h, c.vector) + h.clamp(min=c.scalar)
    ),
    "chained": lambda c, x, h: F.linear(h * F.linear(h, c.square), c.square),
    "cells_of_torch": lambda c, x, h: c.gru(h, h * 2) + c.lstm(h, (h, h * h))[1] + c.elman(x, h),
    "one_step_of_a_layer": lambda c, x, h: c.layer(h[None], (h[None], h[None]))[0][0],
    "in_containers": lambda c, x, h: h * c.held["gain"].to(h.dtype) + c.held["taps"][0].to(h.dtype) * h,
    "scaled": lambda c, x, h: F.linear(h, c.square / c.square.norm()) + F.linear(h, c.square * c.vector[:, None]),
}
