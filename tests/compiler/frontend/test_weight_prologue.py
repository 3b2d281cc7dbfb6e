"""Computations on weights alone keep the user's custom gradients, or the step runs as the Python loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import fusecell as fc
from fusecell.compiler.frontend import Traced, trace

Function = torch.autograd.Function


class StraightThrough(Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return torch.sign(w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


BOUND = StraightThrough.apply  # before any trace


class FakeQuantised(Function):
    """The new style, with numbers among its arguments."""

    @staticmethod
    def forward(w: Tensor, scale: float, bits: int = 4) -> Tensor:
        return (w / scale).round().clamp(-(2.0**bits), 2.0**bits) * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        w, scale, bits = inputs
        ctx.save_for_backward(w.abs() <= scale * 2.0**bits)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (inside,) = ctx.saved_tensors
        return 2 * g * inside, None, None


class SignAndSize(Function):
    """Two results and one that has no gradient, of two weights."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, v: Tensor) -> Any:
        sign, size, positive = w.sign(), w.abs() * v, (w > 0).to(w.dtype)
        ctx.mark_non_differentiable(positive)
        ctx.save_for_backward(w, v)
        return sign, size, positive, None

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        w, v = ctx.saved_tensors
        return 0.3 * gradients[0] + gradients[1] * v, gradients[1] * w.abs() * 5


class Reversed(Function):
    """The weight itself, with another gradient."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -0.5 * g


class Doubled(Function):
    """Changes its argument, and says so."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.mark_dirty(w)
        return w.mul_(2)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 7 * g


class Clipped(Function):
    """Not linear in the gradient: clipped at each step it is another's than clipped once."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w * 1.0

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-0.01, 0.01)


class BinaryLinear(Function):
    """Rows times the sign of a weight; the weight's gradient is the sign's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        sign = w.sign()
        ctx.save_for_backward(x, sign)
        return x @ sign.t()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, sign = ctx.saved_tensors
        return g @ sign, g.t() @ x


class RowsOnly(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * x.sigmoid()


class RowsAndWeight(Function):
    """Hands the weight on beside rows, with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Any:
        return x * 1.0, w * 1.0

    @staticmethod
    def backward(ctx: Any, g: Tensor, gw: Tensor) -> Any:
        return g, 3 * gw


class Branching(Function):
    """A backward that looks at values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g if bool(g.sum() > 0) else 3 * g


class BranchingInNumPy(Branching):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g if g.detach().numpy().sum() > 0 else 3 * g


class FilledByValue(Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return torch.full_like(w, w.max().item())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


@torch.library.custom_op("fusecell_tests::signed", mutates_args=())
def signed(w: Tensor, gain: float) -> Tensor:
    return w.sign() * gain


@signed.register_fake
def _(w: Tensor, gain: float) -> Tensor:
    return torch.empty_like(w)


signed.register_autograd(lambda ctx, g: (4 * g, None), setup_context=lambda ctx, inputs, output: None)


def _two(c: Any) -> Tensor:
    sign, size, positive, nothing = SignAndSize.apply(c.w, c.v)
    assert nothing is None
    return sign + size * positive


def _hooked(c: Any) -> Tensor:
    value = c.w * 2
    value.register_hook(lambda g: 3 * g)
    return value.tanh()


def _node_hooked(c: Any) -> Tensor:
    value = c.w * 2
    value.grad_fn.register_prehook(lambda gradients: (3 * gradients[0],))
    return value.tanh()


def _in_place_without(c: Any) -> Tensor:
    value = c.w * 1.5
    with torch.no_grad():
        value.mul_(2)
    return value.tanh()


def _in_place(c: Any) -> Tensor:
    value = c.w * 1.5
    value.mul_(c.v)
    return value.tanh()


def _within(c: Any) -> Tensor:
    with torch.no_grad():
        fixed = c.w.sign()
        with torch.enable_grad():
            moving = (c.w * c.v).sin()
    return fixed + moving


def _dirty(c: Any) -> Tensor:
    return Doubled.apply(c.w * 1.0).tanh()


WEIGHTS: dict[str, Callable[[Any], Tensor]] = {
    "old_style": lambda c: StraightThrough.apply(c.w),
    "bound_before": lambda c: BOUND(c.w),
    "past_the_wrapper": lambda c: super(Function, StraightThrough).apply(c.w),
    "new_style": lambda c: FakeQuantised.apply(c.w, 0.3),
    "new_style_by_name": lambda c: FakeQuantised.apply(c.w, scale=0.3, bits=2),
    "several_results": _two,
    "nested": lambda c: StraightThrough.apply(FakeQuantised.apply(c.w * c.v, 0.3) + 0.1).t(),
    "view": lambda c: Reversed.apply(c.w),
    "view_then_more": lambda c: Reversed.apply(c.w).tanh(),
    "view_and_itself": lambda c: Reversed.apply(c.w) + c.w,
    "dirty": _dirty,
    "not_linear": lambda c: Clipped.apply(c.w),
    "closure_argument": lambda c: checkpoint(lambda w: (w * c.v).sin(), c.w, use_reentrant=True),
    "checkpoint": lambda c: checkpoint(lambda w: (w * c.v).sin(), c.w, use_reentrant=False),
    "value_inside": lambda c: FilledByValue.apply(c.w),
    "operator": lambda c: signed(c.w, 1.5),
    "operator_of_computed": lambda c: signed(c.w.tanh(), 1.5) * c.v,
    "hook": _hooked,
    "hook_on_a_node": _node_hooked,
    "detach": lambda c: c.w.sign() - c.w.detach() * 2 + c.w * 3,
    "estimator_by_detach": lambda c: (c.w.sign() - c.w).detach() + c.w,
    "no_grad_in_place": _in_place_without,
    "in_place": _in_place,
    "enable_grad": _within,
    "norm": lambda c: c.w / c.w.norm(dim=1, keepdim=True),
}
"""A weight made of the parameters w and v."""


class OfWeights(fc.Cell):
    def __init__(self, weight: Callable[[Any], Tensor]) -> None:
        super().__init__(3, 3)
        self.weight = weight
        self.w = nn.Parameter(torch.randn(3, 3) * 0.5)
        self.v = nn.Parameter(torch.rand(3, 3) + 0.5)

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> Any:
        h = torch.tanh(x + 0.3 * state[0] @ self.weight(self))
        return h, (h,)


def _split(c: Any, x: Tensor, h: Tensor) -> Tensor:
    rows, weight = RowsAndWeight.apply(h, c.w)
    return rows @ weight


def _split_then_more(c: Any, x: Tensor, h: Tensor) -> Tensor:
    rows, weight = RowsAndWeight.apply(h, c.w)
    return rows @ weight.tanh()


ROWS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "rows": lambda c, x, h: RowsOnly.apply(h @ c.w),
    "reversed_rows": lambda c, x, h: Reversed.apply(h) @ c.w,
    "mixed": lambda c, x, h: BinaryLinear.apply(h, c.w),
    "mixed_and_used": lambda c, x, h: BinaryLinear.apply(h, c.w) + h @ c.w,
    "mixed_of_computed": lambda c, x, h: BinaryLinear.apply(h, c.w * c.v),
    "mixed_of_custom": lambda c, x, h: BinaryLinear.apply(h, Reversed.apply(c.w)),
    "mixed_weight": _split,
    "mixed_weight_then_more": _split_then_more,
    "branching_backward": lambda c, x, h: Branching.apply(h),
    "branching_in_numpy": lambda c, x, h: BranchingInNumPy.apply(h),
}


class OfRows(OfWeights):
    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> Any:
        h = torch.tanh(x + 0.3 * self.weight(self, x, state[0]))  # type: ignore[call-arg]
        return h, (h,)


CELLS: dict[str, Callable[[], fc.Cell]] = {
    **{f"weights-{name}": lambda body=body: OfWeights(body) for name, body in WEIGHTS.items()},
    **{f"rows-{name}": lambda body=body: OfRows(body) for name, body in ROWS.items()},
    "wrapped": lambda: fc.Zoneout(OfWeights(WEIGHTS["old_style"]), 0.2).eval(),
    "residual": lambda: fc.Residual(OfWeights(WEIGHTS["new_style"])),
}


def gradients(run: Callable[[Tensor, Tensor], Any], module: nn.Module, runner: str) -> list[Tensor]:
    """The output and the gradients of the inputs, the first state and every parameter."""
    torch.manual_seed(1)
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    h0 = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(6, 2, 3, dtype=torch.float64)
    with fc.runner(runner), warnings.catch_warnings():
        warnings.simplefilter("ignore", fc.EagerWarning)
        y = run(x, h0)
        tensors = [x, h0, *module.parameters()]
        module.zero_grad()
        (y * seed).sum().backward()
    return [y.detach()] + [torch.zeros_like(t) if t.grad is None else t.grad.clone() for t in tensors]


def agree(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CELLS)
def test_gradients_are_the_loops(name: str) -> None:
    torch.manual_seed(0)
    cell = CELLS[name]().double()

    def run(x: Tensor, h0: Tensor) -> Tensor:
        return fc.scan(cell, x, h0)[0]

    agree(gradients(run, cell, "auto"), gradients(run, cell, "eager"))


COMPILED = {
    "weights-old_style", "weights-bound_before", "weights-past_the_wrapper", "weights-new_style",
    "weights-new_style_by_name", "weights-several_results", "weights-nested", "weights-view", "weights-view_then_more",
    "weights-view_and_itself", "weights-checkpoint", "weights-operator", "weights-operator_of_computed",
    "weights-detach", "weights-estimator_by_detach", "weights-no_grad_in_place", "weights-in_place",
    "weights-enable_grad", "weights-norm", "rows-rows", "rows-reversed_rows", "rows-mixed", "rows-mixed_and_used",
    "wrapped", "residual",
}  # fmt: skip
if not isinstance(vars(torch.autograd.Function)["apply"], classmethod):
    # From torch 2.14 on a Function's apply is C: one that was bound before the trace can't be followed.
    COMPILED -= {"weights-bound_before", "weights-past_the_wrapper"}
REFUSED = {
    "weights-dirty": "changes a weight in place",
    "weights-not_linear": "not linear in the gradient",
    "weights-closure_argument": "CheckpointFunction to a weight and a function",
    "weights-value_inside": r"reads the value of a tensor \(.item\(\)\) in test_weight_prologue.py, line \d+",
    "weights-hook": "registers a hook on w_mul",
    "weights-hook_on_a_node": "a hook or a custom Function changes it",
    "rows-mixed_weight_then_more": "RowsAndWeight, a custom Function, has made together with rows",
    "rows-branching_backward": "The step mixes the rows of the batch: .* in the gradient of BranchingBackward",
    "rows-branching_in_numpy": r"reads the value of a tensor \(.numpy\(\)\)",
}


@pytest.mark.parametrize("name", sorted(COMPILED))
def test_these_are_compiled(name: str) -> None:
    torch.manual_seed(0)
    result = trace(CELLS[name]().double(), [(3,)], torch.float64, gradients=True)
    assert isinstance(result, Traced), result


@pytest.mark.parametrize("name", REFUSED)
def test_these_are_refused_with_a_reason(name: str) -> None:
    torch.manual_seed(0)
    cell = CELLS[name]().double()
    with pytest.raises(fc.NotCompilable, match=REFUSED[name]), fc.runner("compiled"):
        fc.scan(cell, torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True))


def test_another_cell_of_the_same_form_has_its_own_weights() -> None:
    torch.manual_seed(0)
    first, second = (OfWeights(WEIGHTS["new_style"]).double() for _ in range(2))
    for cell in (first, second):

        def run(x: Tensor, h0: Tensor, cell: fc.Cell = cell) -> Tensor:
            return fc.scan(cell, x, h0)[0]

        agree(gradients(run, cell, "auto"), gradients(run, cell, "eager"))


def test_gradients_of_gradients() -> None:
    torch.manual_seed(0)
    cell = OfWeights(WEIGHTS["several_results"]).double()
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    second_order = []
    for runner in ("auto", "eager"):
        with fc.runner(runner):
            y, _ = fc.scan(cell, x)
            (g,) = torch.autograd.grad(y.square().sum(), [cell.w], create_graph=True)
            second_order.append(list(torch.autograd.grad(g.square().sum(), [cell.w, cell.v])))
    agree(*second_order)


@pytest.mark.parametrize("name", ["old_style", "operator", "hook"])
def test_recorded_gradients(name: str) -> None:
    torch.manual_seed(0)
    cell = OfWeights(WEIGHTS[name]).double()
    layer, x = fc.Recurrent(cell), torch.randn(4, 2, 3, dtype=torch.float64)
    with fc.runner("eager"):
        expected = torch.autograd.grad(layer(x)[0].square().sum(), list(cell.parameters()), allow_unused=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fc.EagerWarning)
        tape = fc.record(layer, x, gradients=True)
        recorded = torch.autograd.grad(tape.outputs.square().sum(), list(cell.parameters()), allow_unused=True)
    agree([g for g in recorded if g is not None], [g for g in expected if g is not None])


class Binarised(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return StraightThrough.apply(w)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["layer", "cell", "linear"])
def test_parametrizations(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "linear":

        class Linear(fc.Cell):
            def __init__(self) -> None:
                super().__init__(3, 3)
                self.rec = nn.Linear(3, 3)

            def step(self, x: Tensor, state: tuple[Tensor, ...]) -> Any:
                h = torch.tanh(x + self.rec(state[0]))
                return h, (h,)

        module: Any = Linear().double()
        parametrize.register_parametrization(module.rec, "weight", Binarised())
    else:
        module = (fc.GRU(3, 3) if kind == "layer" else fc.GRUCell(3, 3)).double()
        parametrize.register_parametrization(module, "weight_hh_l0" if kind == "layer" else "weight_hh", Binarised())

    def run(x: Tensor, h0: Tensor) -> Tensor:
        result: Tensor = module(x, h0[None])[0] if kind == "layer" else fc.scan(module, x, h0)[0]
        return result

    expected = gradients(run, module, "eager")
    agree(gradients(run, module, "auto"), expected)
    names = [name for name, _ in module.named_parameters()]
    assert next(g for name, g in zip(names, expected[3:], strict=True) if "original" in name).abs().sum() > 0


def test_streams() -> None:
    torch.manual_seed(0)
    cell = OfWeights(WEIGHTS["several_results"])
    x = torch.randn(5, 1, 3)
    with torch.no_grad(), fc.runner("eager"):
        expected, _ = fc.scan(cell, x)
    stream = fc.Stream(cell)
    for t in range(5):
        torch.testing.assert_close(torch.as_tensor(stream.step(x[t].numpy())), expected[t], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["old_style", "new_style", "several_results", "operator", "no_grad_in_place"])
def test_torch_compile(name: str) -> None:
    torch.manual_seed(0)
    cell = OfWeights(WEIGHTS[name]).double()
    layer = fc.Recurrent(cell)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)

    def run(x: Tensor, h0: Tensor) -> Tensor:
        return compiled(x, h0)[0]  # type: ignore[no-any-return]

    def loop(x: Tensor, h0: Tensor) -> Tensor:
        return layer(x, h0)[0]

    agree(gradients(run, cell, "auto"), gradients(loop, cell, "eager"))


def test_torch_export() -> None:
    torch.manual_seed(0)
    layer = fc.Recurrent(OfWeights(WEIGHTS["new_style"]).double())
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    exported = torch.export.export(layer, (x,))
    with torch.no_grad(), fc.runner("eager"):
        torch.testing.assert_close(exported.module()(x)[0], layer(x)[0], rtol=1e-10, atol=1e-10)
