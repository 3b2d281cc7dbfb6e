"""The tracer: graphs that equal torch, forward and backward; sentences for what has no graph."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from traced_cells import Body, BodyCell, both, close, compare, traced, values_of

import fusecell as fc
from fusecell.cells import ZooCell
from fusecell.compiler.frontend import recorder, trace
from fusecell.compiler.ir.graph import Graph
from fusecell.compiler.ir.interpreter import interpret
from fusecell.compiler.refusal import Refusal

Function = Callable[[Tensor], Tensor]


def test_zoo(zoo_cell: ZooCell) -> None:
    cell = zoo_cell.make(5, 6, dtype=torch.float64)
    made = compare(cell)
    assert Graph.parse(made.graph.text).text == made.graph.text


def _square(z: Tensor) -> Tensor:
    return z.view(-1, 2, 3)


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
    "factories": lambda z: z * torch.ones(len(z), 1).double() + torch.tensor(2.0) * z + torch.zeros(6).double(),
    "in_place": lambda z: (z * 2).add_(1).mul_(z).clamp_(-1, 1),
    "detached": lambda z: z * z.detach(),
    "small_products": lambda z: torch.bmm(_square(z), z.view(-1, 3, 2)).flatten(1).repeat(1, 2)[:, :6],
    "outer_products": lambda z: (z[:, :3, None] * z[:, None, :2]).flatten(1),
    "cosine_similarity": lambda z: z * F.cosine_similarity(z[:, :3], z[:, 3:], dim=1)[:, None],
}


def _norm(z: Tensor, order: float) -> Tensor:
    return torch.linalg.vector_norm(z, ord=order, dim=-1, keepdim=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    compare(BodyCell(lambda cell, x, h: FUNCTIONS[name](both(cell, x, h))).double())


# Whose gradients divide zero by zero in torch too; forward only.
@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - {"small_products"}))
def test_nan_and_infinities(name: str) -> None:
    cell = BodyCell(lambda cell, x, h: FUNCTIONS[name](h)).double()
    made = traced(cell, gradients=False)
    h = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e30], dtype=torch.float64)
    h = torch.stack([h, h.roll(1), h.flip(0), torch.full((6,), -math.inf).double(), torch.zeros(6).double()])
    x = torch.zeros(5, 4, dtype=torch.float64)
    found = interpret(made.graph, values_of(made, cell, [("x", x), ("h", h)]))
    close(found["output"], cell.step(x, (h,))[0].detach())


def _frozen_double(cell: Any) -> Tensor:
    with torch.no_grad():
        doubled: Tensor = cell.vector * 2
    return doubled


def _built(cell: Any) -> Tensor:
    made = torch.zeros(6, 6, dtype=torch.float64)
    made[:3] = cell.square[:3] * 2
    return made


WEIGHTS: dict[str, Body] = {
    "vectors": lambda c, x, h: both(c, x, h) * c.vector + c.line * h + c.scalar * h + c.one * h,
    "parts_of_a_vector": lambda c, x, h: c.long[:6] * h + c.long[6:] + c.long.chunk(2)[0] + c.long[3] * h,
    "computed": lambda c, x, h: torch.tanh(
        both(c, x, h) + F.linear(h, c.square - c.square.t()) + h @ c.square + F.linear(h, F.relu(c.square) * c.mask)
    ),
    "tied_and_transposed": lambda c, x, h: torch.tanh(h @ c.square + h @ c.square.t() + c.rec(h) * c.rec(h * h)),
    "on_the_left": lambda c, x, h: (c.square @ h.t()).t() + x @ c.inp.weight.t(),
    "flags": lambda c, x, h: torch.where(c.flags, h, both(c, x, h)) + c.flags * h,
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
    "scaled": lambda c, x, h: F.linear(h, c.square / c.square.norm()) + F.linear(h, c.square * c.vector[:, None]),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name: str) -> None:
    compare(BodyCell(WEIGHTS[name]).double())


def test_every_rule_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that no cell above meets is a rule that nothing compares with torch."""
    met: set[str] = set()

    class Seen(dict[str, Any]):
        def get(self, name: str, default: Any = None) -> Any:
            met.add(name)
            return super().get(name, default)

    monkeypatch.setattr(recorder, "RULES", Seen(recorder.RULES))
    for body in [*WEIGHTS.values(), *(lambda c, x, h, f=f: f(both(c, x, h)) for f in FUNCTIONS.values())]:
        traced(BodyCell(body).double())
    assert set(recorder.RULES) - met == set()


class Straight(torch.autograd.Function):
    """Forward a threshold, backward what its author says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x.sigmoid()


def test_custom_gradient_is_followed() -> None:
    compare(BodyCell(lambda cell, x, h: Straight.apply(both(cell, x, h)) * h).double())


class TwoInputs(fc.Cell):
    inputs = ("x", "noise")
    states = ("h", "c")

    def __init__(self) -> None:
        super().__init__(4, 6)
        self.lin = nn.Linear(4, 6)
        self.state_sizes = (6, 3)

    def step(self, x: tuple[Tensor, Tensor], state: tuple[Tensor, ...]) -> Any:
        (x, noise), (h, c) = x, state
        h_new = self.note("mixed", torch.tanh(self.lin(x) + h * noise.sum((1, 2))[:, None]))
        return h_new, (c.repeat(1, 2), h_new[:, :3] * c)


def test_several_inputs_and_states() -> None:
    made = compare(TwoInputs().double(), [(4,), (2, 5)])
    assert [made.graph[i].name for i in made.graph.leaves("input")] == ["x", "noise", "grad.output", "grad.h", "grad.c"]
    assert made.graph[made.graph.outputs["note.mixed"]].name == "mixed"


def test_names_are_the_users() -> None:
    text = traced(fc.cells.GRUCell(5, 10), dtype=torch.float32).graph.text
    assert all(f"\n{name} = " in text for name in ("r", "z", "n", "weight_ih", "bias_hh"))


def test_nested_notes_carry_their_path() -> None:
    stack = fc.Stack(fc.GRUCell(4, 6), fc.GRUCell(6, 6)).double()
    made = compare(stack)
    assert {"note.cells.0.r", "note.cells.1.n"} <= set(made.graph.outputs)


def test_frozen_weights_have_no_gradient() -> None:
    cell = fc.GRUCell(5, 6).double()
    cell.weight_ih.requires_grad_(False)
    assert "grad.weight.weight_ih" not in compare(cell).graph.outputs


def test_tied_weights_are_one_leaf() -> None:
    cell = BodyCell(lambda cell, x, h: cell.rec(h) + F.linear(h, cell.square)).double()
    cell.square = cell.rec.weight
    made = compare(cell)
    assert len(made.graph.leaves("weight")) == 1


def test_plain_tensor_attributes_are_read_anew() -> None:
    cell = BodyCell(lambda cell, x, h: h * cell.gain).double()
    cell.gain = torch.full((6,), 2.0, dtype=torch.float64)
    made = traced(cell)
    cell.gain = torch.full((6,), 5.0, dtype=torch.float64)
    assert made.weights.values(cell)[0][0] == 5


@pytest.mark.parametrize("apply", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_parametrized_weights_are_seen(apply: Callable[..., nn.Module]) -> None:
    cell = BodyCell(lambda cell, x, h: torch.tanh(cell.rec(h))).double()
    cell.rec = apply(cell.rec)
    made = compare(cell)
    before = made.weights.values(cell)[0].detach().clone()
    with torch.no_grad():
        next(cell.rec.parametrizations.parameters()).mul_(0.5).add_(0.1)
    after = made.weights.values(cell)[0]
    assert not torch.equal(before, after)
    close(after.detach(), cell.rec.weight.detach())


def test_writes_into_data_are_seen() -> None:
    cell = fc.GRUCell(5, 6)
    made = traced(cell, dtype=torch.float32)
    cell.weight_hh.data.copy_(torch.ones(18, 6))
    names = [made.graph[index].name for index in made.graph.leaves("weight")]
    assert dict(zip(names, made.weights.values(cell), strict=True))["weight_hh"] is cell.weight_hh


def test_slices_of_parameters_need_no_prologue() -> None:
    described = traced(fc.cells.MGUCell(5, 6).double()).weights.describe()
    assert "aten" not in described


# refusals

OUTSIDE = torch.rand(6, dtype=torch.float64)


def _changed_while_viewed(h: Tensor) -> Tensor:
    doubled = h * 2
    part = doubled[:, :3]
    doubled.add_(1)
    return torch.cat([part, part], 1)


def _part_changed(h: Tensor) -> Tensor:
    doubled = h * 2
    doubled[:, :3] += 1
    return doubled


REFUSED: dict[str, tuple[Body, str]] = {
    "branch": (lambda c, x, h: h if c.scalar > 0 else -h, r"reads the value of a tensor \(bool\(\)\) in test_trace.py"),
    "float": (lambda c, x, h: h * float(c.scalar), r"float\(\)"),
    "item": (lambda c, x, h: h * c.scalar.item(), r"\.item\(\)"),
    "numpy": (lambda c, x, h: h * float(h.detach().numpy().sum()), r"\.numpy\(\)"),
    "tolist": (lambda c, x, h: h * h.detach().tolist()[0][0], r"\.tolist\(\)"),
    "print": (lambda c, x, h: h * len(str(h)), "print"),
    "closure": (lambda c, x, h: h * OUTSIDE, r"neither an input.*register_buffer.*test_trace.py"),
    "literal": (lambda c, x, h: h * torch.tensor([1.0, 2, 3, 4, 5, 6]), "neither an input"),
    "random": (lambda c, x, h: h + torch.randn_like(h), "Cell.draw"),
    "dropout": (lambda c, x, h: F.dropout(h, 0.5, True), "Cell.draw"),
    "batch_mean": (lambda c, x, h: h - h.mean(0), "mixes the rows"),
    "batch_sum": (lambda c, x, h: h - h.sum(0), "mixes the rows"),
    "attention_over_rows": (lambda c, x, h: h @ h.t() @ h, "across rows"),
    "first_row": (lambda c, x, h: h[0] + h, "mixes the rows"),
    "reversed_rows": (lambda c, x, h: h.flip(0), "mixes the rows"),
    "batch_norm": (lambda c, x, h: F.batch_norm(h, None, None, training=True), "native_batch_norm has no rule"),
    "batch_size": (lambda c, x, h: h / h.shape[0], "traced twice"),
    "elements": (lambda c, x, h: h * h.numel(), "traced twice"),
    "input_in_place": (lambda c, x, h: h.mul_(2), "in place"),
    "weight_in_place": (lambda c, x, h: h * c.vector.detach().mul_(2), "in place"),
    "buffer_in_place": (lambda c, x, h: h * c.flags.logical_not_(), "in place"),
    "part_in_place": (lambda c, x, h: _part_changed(h), "in place"),
    "in_place_while_viewed": (lambda c, x, h: _changed_while_viewed(h), "in place"),
    "other_format": (lambda c, x, h: h.float().double(), "float32 where the cell is torch.float64"),
    "gradient_of_max": (lambda c, x, h: h * h.max(1, keepdim=True)[0], "max"),
    "cumsum": (lambda c, x, h: h.cumsum(1), r"cumsum has no rule.*test_trace.py"),
    "error": (lambda c, x, h: h.missing, "AttributeError"),
    "shape": (lambda c, x, h: h[:, :3], "expected"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    body, sentence = REFUSED[name]
    cell = BodyCell(body).double()
    before = {key: value.clone() for key, value in cell.state_dict().items()}
    state = torch.get_rng_state()
    made = trace(cell, [(4,)], torch.float64, gradients=True)
    assert isinstance(made, Refusal)
    assert len(made.reasons) == 1
    assert re.search(sentence, made.reasons[0]), made.reasons
    assert torch.equal(state, torch.get_rng_state())
    for key, value in cell.state_dict().items():
        assert torch.equal(before[key], value), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    made = trace(fc.GRUCell(5, 6).to(dtype), [(5,)], dtype, gradients=False)
    assert isinstance(made, Refusal)
    assert str(dtype) in made.reasons[0]


def test_hooks_are_refused() -> None:
    cell = BodyCell(both)
    cell.rec.register_forward_hook(lambda *_: None)
    made = trace(cell, [(4,)], torch.float32, gradients=False)
    assert isinstance(made, Refusal)
    assert "rec has hooks" in made.reasons[0]


# surroundings


def _surroundings() -> list[Any]:
    return [torch.no_grad(), torch.inference_mode(), torch.autocast("cpu"), torch.device("meta")]


@pytest.mark.parametrize("place", range(4), ids=["no_grad", "inference_mode", "autocast", "default_device"])
def test_surroundings_change_nothing(place: int) -> None:
    cell = fc.cells.LayerNormGRUCell(5, 6)
    plain = traced(cell, dtype=torch.float32)
    with _surroundings()[place]:
        assert traced(cell, dtype=torch.float32).graph.text == plain.graph.text


def test_leaves_no_trace() -> None:
    cell = fc.GRUCell(5, 6)
    calls: list[Tensor] = []
    cell.weight_hh.register_hook(calls.append)
    state, profile = torch.get_rng_state(), sys.getprofile()
    traced(cell, dtype=torch.float32)
    assert torch.equal(state, torch.get_rng_state())
    assert sys.getprofile() is profile
    assert not calls
    assert all(parameter.grad is None for parameter in cell.parameters())
    (cell(torch.rand(3, 5)).sum()).backward()
    assert len(calls) == 1


def test_first_trace_imports_no_compiler_of_torchs() -> None:
    code = (
        "import sys, torch, fusecell as fc\n"
        "from fusecell.compiler.frontend import trace, Traced\n"
        "for gradients in (False, True):\n"
        "    assert isinstance(trace(fc.GRUCell(5, 10), [(5,)], torch.float32, gradients=gradients), Traced)\n"
        "found = {'torch._dynamo', 'sympy'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
