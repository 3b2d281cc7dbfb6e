"""The tracer: graphs compute what torch does, forward and backward, or a sentence says why there is none."""

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

import fusecell as fc
from fusecell.cells import ZooCell
from fusecell.compiler.frontend import Traced, operation_values, trace
from fusecell.compiler.ir.graph import Graph
from fusecell.compiler.ir.interpreter import interpret
from fusecell.compiler.refusal import Refusal
from tests.compiler.axis_cells import AXES, AxisCell
from tests.compiler.elementwise_functions import FUNCTIONS as ELEMENTWISE
from tests.compiler.traced_cells import (
    FUNCTIONS,
    WEIGHTS,
    Body,
    BodyCell,
    both,
    close,
    compare,
    traced,
    values_of,
)


def traced_reason(cell: fc.Cell, dtype: torch.dtype = torch.float32) -> str:
    """Return why the gradient of a step is not traced."""
    result = trace(cell, [(cell.input_size,)], dtype, gradients=True)
    assert isinstance(result, Refusal)
    return result.reasons[0]


def test_zoo(zoo_cell: ZooCell) -> None:
    cell = zoo_cell.make(5, 6, dtype=torch.float64)
    step_trace = compare(cell)
    assert Graph.parse(step_trace.graph.text).text == step_trace.graph.text


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    compare(BodyCell(lambda cell, x, h: FUNCTIONS[name](both(cell, x, h))).double())


# Whose gradients divide zero by zero in torch too; forward only.
@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - {"small_products"}))
def test_nan_and_infinities(name: str) -> None:
    cell = BodyCell(lambda cell, x, h: FUNCTIONS[name](h)).double()
    step_trace = traced(cell, gradients=False)
    h = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e30], dtype=torch.float64)
    h = torch.stack([h, h.roll(1), h.flip(0), torch.full((6,), -math.inf).double(), torch.zeros(6).double()])
    x = torch.zeros(5, 4, dtype=torch.float64)
    results = interpret(step_trace.graph, values_of(step_trace, cell, [("x", x), ("h", h)]))
    close(results["output"], cell.step(x, (h,))[0].detach())


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name: str) -> None:
    compare(BodyCell(WEIGHTS[name]).double())


# Other names of what is tried: torch 2.13 calls these in other forms of a call, or on other devices.
UNTRIED = {
    "dot",
    "vdot",
    "addmv",
    "_unsafe_index",
    "_index_put_impl",
    "argsort",
    "_native_batch_norm_legit_no_training",
    "_linalg_det",
    "_linalg_slogdet",
}


def test_every_rule_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rule is used by a cell above, and so compared with torch."""
    met: set[str] = set()

    class Seen(dict[str, Any]):
        def get(self, name: str, default: Any = None) -> Any:
            met.add(name)
            return super().get(name, default)

    monkeypatch.setattr(operation_values, "RULES", Seen(operation_values.RULES))
    for body in [*WEIGHTS.values(), *(lambda c, x, h, f=f: f(both(c, x, h)) for f in FUNCTIONS.values())]:
        traced(BodyCell(body).double())
    for body in AXES.values():
        traced(AxisCell(body).double())
    for function in (f for name, f in ELEMENTWISE.items() if not name.startswith("pad")):
        traced(BodyCell(lambda c, x, h, f=function: f(both(c, x, h), h)).double())
    assert set(operation_values.RULES) - met - UNTRIED == set()


class Straight(torch.autograd.Function):
    """A threshold with a straight-through gradient."""

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
    step_trace = compare(TwoInputs().double(), [(4,), (2, 5)])
    assert [step_trace.graph[i].name for i in step_trace.graph.leaves("input")] == [
        "x",
        "noise",
        "grad.output",
        "grad.h",
        "grad.c",
    ]
    assert step_trace.graph[step_trace.graph.outputs["note.mixed"]].name == "mixed"


def test_names_are_the_users() -> None:
    text = traced(fc.cells.GRUCell(5, 10), dtype=torch.float32).graph.text
    assert all(f"\n{name} = " in text for name in ("r", "z", "n", "weight_ih", "bias_hh"))


def test_nested_notes_carry_their_path() -> None:
    stack = fc.Stack(fc.GRUCell(4, 6), fc.GRUCell(6, 6)).double()
    step_trace = compare(stack)
    assert {"note.cells.0.r", "note.cells.1.n"} <= set(step_trace.graph.outputs)


def test_frozen_weights_have_no_gradient() -> None:
    cell = fc.GRUCell(5, 6).double()
    cell.weight_ih.requires_grad_(False)
    assert "grad.weight.weight_ih" not in compare(cell).graph.outputs


def test_tied_weights_are_one_leaf() -> None:
    cell = BodyCell(lambda cell, x, h: cell.rec(h) + F.linear(h, cell.square)).double()
    cell.square = cell.rec.weight
    step_trace = compare(cell)
    assert len(step_trace.graph.leaves("weight")) == 1


def test_plain_tensor_attributes_are_read_anew() -> None:
    cell = BodyCell(lambda cell, x, h: h * cell.gain).double()
    cell.gain = torch.full((6,), 2.0, dtype=torch.float64)
    step_trace = traced(cell)
    cell.gain = torch.full((6,), 5.0, dtype=torch.float64)
    assert step_trace.weights.values(cell)[0][0] == 5


@pytest.mark.parametrize("apply", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_parametrized_weights_are_seen(apply: Callable[..., nn.Module]) -> None:
    cell = BodyCell(lambda cell, x, h: torch.tanh(cell.rec(h))).double()
    cell.rec = apply(cell.rec)
    step_trace = compare(cell)
    before = step_trace.weights.values(cell)[0].detach().clone()
    with torch.no_grad():
        next(cell.rec.parametrizations.parameters()).mul_(0.5).add_(0.1)
    after = step_trace.weights.values(cell)[0]
    assert not torch.equal(before, after)
    close(after.detach(), cell.rec.weight.detach())


def test_writes_into_data_are_seen() -> None:
    cell = fc.GRUCell(5, 6)
    step_trace = traced(cell, dtype=torch.float32)
    cell.weight_hh.data.copy_(torch.ones(18, 6))
    names = [step_trace.graph[index].name for index in step_trace.graph.leaves("weight")]
    assert dict(zip(names, step_trace.weights.values(cell), strict=True))["weight_hh"] is cell.weight_hh


def test_slices_of_parameters_need_no_prologue() -> None:
    described = traced(fc.cells.MGUCell(5, 6).double()).weights.describe()
    assert "aten" not in described


# refusals


def _outside() -> Callable[[], Tensor]:
    hidden = torch.rand(6, dtype=torch.float64)
    return lambda: hidden


_hidden = _outside()


REFUSED: dict[str, tuple[Body, str]] = {
    "branch": (
        lambda c, x, h: h if c.scalar > 0 else -h,
        r"reads the value of a tensor \(bool\(\)\) in test_tracer.py",
    ),
    "float": (lambda c, x, h: h * float(c.scalar), r"float\(\)"),
    "item": (lambda c, x, h: h * c.scalar.item(), r"\.item\(\)"),
    "numpy": (lambda c, x, h: h * float(h.detach().numpy().sum()), r"\.numpy\(\)"),
    "tolist": (lambda c, x, h: h * h.detach().tolist()[0][0], r"\.tolist\(\)"),
    "print": (lambda c, x, h: h * len(str(h)), "print"),
    "closure": (lambda c, x, h: h * _hidden(), r"neither an input.*register_buffer.*test_tracer.py"),
    "random": (lambda c, x, h: h + torch.randn_like(h), "Cell.draw"),
    "dropout": (lambda c, x, h: F.dropout(h, 0.5, True), "Cell.draw"),
    "batch_mean": (lambda c, x, h: h - h.mean(0), "mixes the rows"),
    "batch_sum": (lambda c, x, h: h - h.sum(0), "mixes the rows"),
    "attention_over_rows": (lambda c, x, h: h @ h.t() @ h, "across rows"),
    "first_row": (lambda c, x, h: h[0] + h, "mixes the rows"),
    "reversed_rows": (lambda c, x, h: h.flip(0), "mixes the rows"),
    "batch_norm": (lambda c, x, h: F.batch_norm(h, None, None, training=True), "statistics of the batch"),
    "batch_size": (lambda c, x, h: h / h.shape[0], "traced twice"),
    "elements": (lambda c, x, h: h * h.numel(), "traced twice"),
    "input_in_place": (lambda c, x, h: h.mul_(2), "in place"),
    "weight_in_place": (lambda c, x, h: h * c.vector.detach().mul_(2), "in place"),
    "buffer_in_place": (lambda c, x, h: h * c.flags.logical_not_(), "in place"),
    "other_format": (
        lambda c, x, h: h * torch.bmm(h.float()[:, None], h.float()[:, :, None])[:, 0].double(),
        "float32 where the cell is torch.float64",
    ),
    "no_rule": (lambda c, x, h: h * h.mode(1, keepdim=True)[0], r"mode has no rule.*test_tracer.py"),
    "no_elements": (
        lambda c, x, h: h + h[:, :0].sum(-1, keepdim=True),
        r"shape \(N, 0\), which has no elements.*test_tracer.py",
    ),
    "error": (lambda c, x, h: h.missing, "AttributeError"),
    "shape": (lambda c, x, h: h[:, :3], "expected"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    body, sentence = REFUSED[name]
    cell = BodyCell(body).double()
    before = {key: value.clone() for key, value in cell.state_dict().items()}
    state = torch.get_rng_state()
    result = trace(cell, [(4,)], torch.float64, gradients=True)
    assert isinstance(result, Refusal)
    assert len(result.reasons) == 1
    assert re.search(sentence, result.reasons[0]), result.reasons
    assert torch.equal(state, torch.get_rng_state())
    for key, value in cell.state_dict().items():
        assert torch.equal(before[key], value), key


def test_other_dtypes_are_refused() -> None:
    result = trace(fc.GRUCell(5, 6), [(5,)], torch.complex64, gradients=False)
    assert isinstance(result, Refusal)
    assert "torch.complex64" in result.reasons[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_have_the_graph_of_float32(dtype: torch.dtype) -> None:
    cell = fc.GRUCell(5, 6)
    expected = trace(cell, [(5,)], torch.float32, gradients=True)
    result = trace(cell.to(dtype), [(5,)], dtype, gradients=True)
    assert isinstance(expected, Traced)
    assert isinstance(result, Traced)
    marked = '"numbers": "bf16", '  # of matrices, which may be multiplied by pairs
    assert result.graph.text.count(marked) == (2 if dtype is torch.bfloat16 else 0)
    assert result.graph.text.replace(marked, "") == expected.graph.text
    assert (result.dtype, expected.dtype) == (dtype, torch.float32)


def test_hooks_are_refused() -> None:
    cell = BodyCell(both)
    cell.rec.register_forward_hook(lambda *_: None)
    result = trace(cell, [(4,)], torch.float32, gradients=False)
    assert isinstance(result, Refusal)
    assert "rec has hooks" in result.reasons[0]


@pytest.mark.parametrize(("states", "inputs"), [(("h", "h"), ("x",)), (("my state",), ("x",)), (("h",), ("",))])
def test_names_that_a_graph_cannot_have_are_refused(states: tuple[str, ...], inputs: tuple[str, ...]) -> None:
    cell = type("Named", (BodyCell,), {"states": states, "inputs": inputs})(both)
    result = trace(cell, [(4,)], torch.float32, gradients=False)
    assert isinstance(result, Refusal)
    assert f"Its states are called {', '.join(map(repr, states))}" in result.reasons[0]


# surroundings


def _surroundings() -> list[Any]:
    return [torch.no_grad(), torch.inference_mode(), torch.autocast("cpu"), torch.device("meta")]


@pytest.mark.parametrize("place", range(4), ids=["no_grad", "inference_mode", "autocast", "default_device"])
def test_torch_modes_do_not_change_a_trace(place: int) -> None:
    cell = fc.cells.LayerNormGRUCell(5, 6)
    plain = traced(cell, dtype=torch.float32)
    with _surroundings()[place]:
        assert traced(cell, dtype=torch.float32).graph.text == plain.graph.text


def test_tracing_changes_no_global_state() -> None:
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
        "heavy = {'torch._dynamo', 'sympy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


class _ByBuffer(fc.Cell):
    """A cell that repeats its step as often as a buffer says."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("times", torch.tensor(3))
        self.register_buffer("grid", torch.tensor([0.0, 0.5, 1.0]))

    def step(self, x, state):
        (h,) = state
        for _ in range(int(self.times)):
            h = torch.tanh(h + x)
        if (self.grid[1:] > self.grid[:-1]).all():
            h = h + self.grid[1]
        return h, (h,)


def test_values_of_buffers_may_be_read_while_they_stay() -> None:
    cell, x = _ByBuffer(), torch.randn(5, 3, 4)

    def difference() -> float:
        with fc.runner("compiled"):
            compiled = fc.scan(cell, x)[0]
        with fc.runner("eager"):
            return (compiled - fc.scan(cell, x)[0]).abs().max().item()

    assert difference() < 1e-6
    cell.times.fill_(2)
    with pytest.raises(fc.NotCompilable, match="another value than when it was compiled"):
        difference()
    fc.refresh(cell)
    assert difference() < 1e-6


def _overwrites(cell, x, h):
    gates = both(cell, x, h).clone()
    gates[:, :3].sigmoid_()
    gates[:, 3:].tanh_()
    return gates * 2


def test_refusals_of_values_overwritten() -> None:
    reason = traced_reason(BodyCell(_overwrites))
    assert "g.sigmoid() for g.sigmoid_()" in reason
    assert "number of rows" not in reason


def test_refusals_of_sizes_that_are_zero() -> None:
    cell = BodyCell(lambda cell, x, h: h)
    cell.input_size = 0
    assert "Its input x has the size (N, 0), and no numbers" in traced_reason(cell)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("h = h.cumsum(0)", "each row is a sequence of its own [aten.cumsum]."),
        ("h = h * float(h[0, 0])", "reads the value of a tensor (float()). A compiled loop"),
    ],
)
def test_refusals_of_code_without_a_file(line: str, reason: str) -> None:
    """That of ``python -c``: no line is named, and none of what runs the trace."""
    names: dict[str, Any] = {"fc": fc}
    exec(f"class C(fc.Cell):\n def step(self, x, state):\n  (h,) = state\n  {line}\n  return h, (h,)", names)
    assert reason in traced_reason(names["C"](3, 3))


def test_refusals_of_sparse_weights() -> None:
    cell = BodyCell(lambda cell, x, h: torch.sparse.mm(cell.graph, h.t()).t())
    cell.register_buffer("graph", torch.eye(6).to_sparse())
    assert "The cell's graph is not a dense tensor on the CPU: keep its zeros" in traced_reason(cell)


def test_parametrizations_that_change_themselves() -> None:
    cell = BodyCell(lambda cell, x, h: cell.rec(h) + cell.inp(x)).double()
    parametrizations.spectral_norm(cell.rec)
    assert "self.rec.parametrizations.eval() leaves it as it is" in traced_reason(cell, torch.float64)
    cell.rec.parametrizations.eval()
    compare(cell)


def test_dtypes_may_be_compared() -> None:
    def body(cell, x, h):
        wide = torch.promote_types(x.dtype, torch.float32)
        return h.to(torch.result_type(h, 2.0)) * (2.0 if torch.can_cast(torch.float32, wide) else 3.0)

    compare(BodyCell(body).double())


def _gradient(cell, x, h):
    return x - 0.3 * torch.func.grad(lambda q: torch.tanh(q @ cell.w).sum())(h)


def _energy(cell, x, h):
    with torch.enable_grad():
        q = h if h.requires_grad else h.detach().requires_grad_()
        (slope,) = torch.autograd.grad(torch.tanh(q @ cell.w).sum(), q, create_graph=True)
    return x - 0.3 * slope


def _solved_by_hessian(cell, x, h):
    """Accelerations of a learned energy: the zero tangents of torch's forward mode meet numbers here."""

    def energy(q, v):
        return 0.5 * (v**2).sum() + 0.1 * torch.tanh(torch.cat([q, v]) @ cell.w[:4, :3]).sum()

    def force(q, v, u):
        return torch.linalg.solve(torch.func.hessian(energy, 1)(q, v), u - torch.func.jacrev(energy)(q, v))

    return torch.cat([h[:, :4], torch.vmap(force)(h[:, :2], h[:, 2:4], x[:, :2])], 1)


TRANSFORMS = {
    "vmap": lambda c, x, h: torch.vmap(lambda a, b: torch.tanh(a / (1 + b.norm()) + (a @ c.w) * b.sum()))(x, h),
    "grad": _gradient,
    "vmap of grad": lambda c, x, h: x - torch.vmap(torch.func.grad(lambda q: torch.tanh(q @ c.w).sum()))(h),
    "vjp": lambda c, x, h: torch.func.vjp(lambda q: torch.sin(q @ c.w), h)[1](x)[0],
    "jvp": lambda c, x, h: torch.func.jvp(lambda q: torch.sin(q @ c.w), (h,), (x,))[1],
    "jacrev": lambda c, x, h: (torch.vmap(torch.func.jacrev(lambda q: torch.sin(q @ c.w)))(h) @ x[..., None])[..., 0],
    "hessian": _solved_by_hessian,
    "autograd.grad": _energy,
}


class _Transforming(fc.Cell):
    def __init__(self, name: str) -> None:
        super().__init__(6, 6)
        self.name = name
        self.w = torch.nn.Parameter(torch.randn(6, 6) * 0.4)

    def step(self, x, state):
        h = TRANSFORMS[self.name](self, x, state[0])
        return h, (h,)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_in_a_step(name: str) -> None:
    torch.manual_seed(0)
    cell, results = _Transforming(name).double(), []
    x = torch.randn(5, 3, 6, dtype=torch.float64, requires_grad=True)
    for runner in ("compiled", "eager"):
        with fc.runner(runner):
            y = fc.scan(cell, x)[0]
            results.append((y, *torch.autograd.grad(y.sin().sum(), [x, cell.w])))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


def test_a_state_may_have_the_name_of_an_input() -> None:
    class Shifted(fc.Cell):
        states = ("x", "b")

        def step(self, x, state):
            a, b = state
            return torch.tanh(a + x), (torch.tanh(x * a + 0.1), b + x)

    cell, results = Shifted(5, 5), []
    x = torch.randn(4, 3, 5, requires_grad=True)
    for runner in ("compiled", "eager"):
        with fc.runner(runner):
            y, after = fc.scan(cell, x)
            results.append((y, *after, *torch.autograd.grad(y.sum() + after[1].sum(), [x])))
    torch.testing.assert_close(*results)


def test_a_complex_weight_of_which_others_are_made_has_its_own_gradient_too() -> None:
    class Diagonal(fc.Cell):
        def __init__(self) -> None:
            super().__init__(2, 12)
            self.output_size = 2
            self.real, self.imaginary = (torch.nn.Parameter(torch.randn(2, 3)) for _ in range(2))

        def step(self, x, state):
            z = torch.view_as_complex(state[0].view(-1, 2, 3, 2))
            pole = -torch.exp(self.real) + 1j * self.imaginary
            z = torch.exp(pole) * z + (torch.exp(pole) - 1) / pole * x.unsqueeze(-1)
            return z.sum(-1).real, (torch.view_as_real(z).flatten(1),)

    torch.manual_seed(0)
    cell, results = Diagonal().double(), []
    x = torch.randn(4, 3, 2, dtype=torch.float64)
    for runner in ("compiled", "eager"):
        with fc.runner(runner):
            y = fc.scan(cell, x)[0]
            results.append((y, *torch.autograd.grad(y.sin().sum(), list(cell.parameters()))))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


def test_a_float64_number_next_to_a_float32_tensor_is_rounded() -> None:
    """A tensor without dimensions doesn't promote another: torch computes in the other's dtype."""

    class Scaled(fc.Cell):
        def __init__(self) -> None:
            super().__init__(5, 5)
            self.register_buffer("scale", torch.tensor(0.37, dtype=torch.float64))
            self.register_buffer("bound", torch.tensor(1 / 3, dtype=torch.float64))

        def step(self, x, state):
            h = (x + state[0]).float() * self.scale - self.scale * 0.1
            h = torch.where(h > self.bound, h, h * (1 - self.scale))
            return h.double(), (torch.tanh(x * h),)

    cell = Scaled()
    results, x = [], torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    for runner in ("compiled", "eager"):
        with fc.runner(runner):
            y = fc.scan(cell, x)[0]
            results.append((y, *torch.autograd.grad(y.sin().sum(), x)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pythons_complex_numbers_have_the_precision_of_the_step(dtype: torch.dtype) -> None:
    """Autograd keeps 1j as a complex128 number for the gradient, whatever it is multiplied with."""

    class Waves(fc.Cell):
        def step(self, x, state):
            h = torch.exp(1j * torch.complex(x, state[0])).imag
            return h, (torch.tanh(h),)

    results, x = [], torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    for runner in ("compiled", "eager"):
        with fc.runner(runner):
            y = fc.scan(Waves(5, 5), x)[0]
            results.append((y, *torch.autograd.grad(y.sin().sum(), x)))
    torch.testing.assert_close(*results)


def test_complex_arithmetic_in_another_precision_is_refused() -> None:
    class Wider(fc.Cell):
        def step(self, x, state):
            h = (torch.exp(x.to(torch.complex128) * 1j).real + state[0]).to(x.dtype)
            return h, (h,)

    result = trace(Wider(5, 5), [(5,)], torch.float32, gradients=False)
    assert not isinstance(result, Traced)
    assert "complex128" in result.reasons[0]


class ComplexWeights(fc.Cell):
    """A linear recurrence as S5 and the LRU write it: complex matrices, stored as such or as pairs of real numbers."""

    def __init__(self, way: str, is_stored: bool) -> None:
        super().__init__(5, 5)
        self.state_sizes = ((4, 2),)
        shapes = {"up": (4, 5), "down": (5, 4), "turn": (4,)}
        for name, shape in shapes.items():
            weight = torch.randn(*shape, dtype=torch.complex128) * 0.4
            setattr(self, name, nn.Parameter(weight if is_stored else torch.view_as_real(weight).clone()))
        self.way = way

    def step(self, x, state):
        up, down, turn = (
            weight if weight.is_complex() else torch.view_as_complex(weight)
            for weight in (self.up, self.down, self.turn)
        )
        z, h = x.to(up.dtype), torch.view_as_complex(state[0].contiguous())
        h = torch.exp(-turn * turn.conj() + 1j * turn.imag) * h
        if self.way == "einsum":
            h = h + torch.einsum("pi,ni->np", up, z)
            y = torch.einsum("ip,np->ni", down, h).real
        elif self.way == "conjugate":
            h = h + (up @ z.unsqueeze(-1)).squeeze(-1)
            y = (h @ down.conj().t()).real + torch.matmul(down, h.conj().unsqueeze(-1)).squeeze(-1).imag
        else:  # in a product and element by element
            h = h + F.linear(z, up) + up[:, 0] * x[:, :4] + (up.abs() * x[:, None]).sum(-1)
            y = (h @ down.T + down[:, 1] * h[:, :1]).real
        return y, (torch.view_as_real(h),)


@pytest.mark.parametrize("is_stored", [True, False])
@pytest.mark.parametrize("way", ["einsum", "conjugate", "mixed"])
def test_complex_weights_have_the_gradients_of_the_loop(way: str, is_stored: bool) -> None:
    torch.manual_seed(0)
    cell, results = ComplexWeights(way, is_stored).double(), []
    x = torch.randn(7, 3, 5, dtype=torch.float64, requires_grad=True)
    for runner in ("compiled", "eager"):
        with fc.runner(runner):
            y, state = fc.scan(cell, x)
            gradients = torch.autograd.grad(y.sin().sum() + state.sum(), [x, *cell.parameters()])
        results.append((y, state, *gradients))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)
    stream = fc.Stream(cell, 3)
    steps = torch.stack([torch.from_numpy(stream.step(step.detach().numpy())).clone() for step in x])
    torch.testing.assert_close(steps, results[1][0].detach(), rtol=1e-11, atol=1e-11)


def test_the_part_of_a_conjugate_that_is_detached_has_no_gradient() -> None:
    class Detached(fc.Cell):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.turn = nn.Parameter(torch.randn(4, 2, dtype=torch.float64))

        def step(self, x, state):
            turn = torch.view_as_complex(self.turn)
            z = (turn * turn.conj().detach() + turn * turn.detach().conj()) * torch.complex(x, state[0])
            return z.real, (z.imag,)

    torch.manual_seed(0)
    cell, results = Detached(), []
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    for runner in ("compiled", "eager"):
        with fc.runner(runner):
            results.append(torch.autograd.grad(fc.scan(cell, x)[0].sum(), cell.turn))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)
