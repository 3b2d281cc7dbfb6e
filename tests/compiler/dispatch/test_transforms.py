"""Calls under torch.func and with dual numbers run machine code, with the Python loop's numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils._pytree import tree_leaves

import fusecell as fc
from fusecell import cells

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's own forward-mode rules
DTYPE = torch.float64


class Several(fc.Cell):
    """A cell with two states, a matrix among them, two outputs, and a weight that is used twice."""

    states = ("m", "h")
    state_sizes = ((2, 3), 4)

    def __init__(self) -> None:
        super().__init__(5, 4)
        self.output_size = {"a": 4, "b": (3, 2)}
        self.into, self.out = nn.Linear(5, 6), nn.Linear(6, 4)

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        m, h = state
        m = torch.tanh(m + self.into(x).unflatten(1, (2, 3)))
        h = torch.sigmoid(self.out(m.flatten(1)) + h) * self.out.bias
        return {"a": h, "b": m.transpose(1, 2)}, (m, h)


class Normed(fc.Cell):
    """A layer norm, which torch has a kernel for, and a weight that is computed of two."""

    def __init__(self) -> None:
        super().__init__(5, 4)
        self.norm, self.scale, self.weight = (
            nn.LayerNorm(4),
            nn.Parameter(torch.ones(4, 1)),
            nn.Parameter(torch.rand(4, 9)),
        )

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
        h = torch.tanh(self.norm(torch.cat((x, state[0]), -1) @ (self.scale * self.weight).T))
        return h, (h,)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "gru": lambda: fc.Recurrent(fc.GRUCell(5, 4)),
    "lstm": lambda: fc.LSTM(5, 4, num_layers=2, bidirectional=True),
    "mgu, reversed": lambda: fc.Recurrent(cells.MGUCell(5, 4), reverse=True),
    "several outputs": lambda: fc.Recurrent(Several()),
    "batch first": lambda: fc.Recurrent(fc.GRUCell(5, 4), batch_first=True),
}


def outputs_of(layer: nn.Module, weights: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    return tree_leaves(functional_call(layer, weights, (x,)))


def loss_of(layer: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    return sum(value.sin().sum() for value in outputs_of(layer, weights, x))


def _backward_through_vmap(layer, weights, x):
    stacked = {name: torch.stack((value, 0.5 * value, value.cos())).requires_grad_() for name, value in weights.items()}
    results = vmap(lambda w: outputs_of(layer, w, x))(stacked)
    return results, torch.autograd.grad(sum(value.sin().sum() for value in results), list(stacked.values()))


def _dual(layer, weights, x):
    with forward_ad.dual_level():
        values = outputs_of(layer, weights, forward_ad.make_dual(x, x.cos()))
        return [tuple(forward_ad.unpack_dual(value)) for value in values]


def _reverse_over_forward(layer, weights, x):
    leaf = x.clone().requires_grad_()
    results, tangents = jvp(lambda x: outputs_of(layer, weights, x), (leaf,), (x.cos(),))
    return torch.autograd.grad(sum(value.square().sum() for value in (*results, *tangents)), leaf)


def _learnt_in_a_loop(layer, weights, x):
    """A gradient step inside a loss, as of MAML."""
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    inner = grad(lambda w: loss_of(layer, w, x))(leaves)
    loss = loss_of(layer, {name: value - 0.1 * inner[name] for name, value in leaves.items()}, x)
    return torch.autograd.grad(loss, list(leaves.values()))


def _cosines(weights):
    return {name: value.cos() for name, value in weights.items()}


def _dual_gradients(layer, weights, x):
    """The gradients of dual numbers by torch's autograd, with their tangents; those of the tangents too."""
    with forward_ad.dual_level():
        leaves = {
            name: forward_ad.make_dual(value.clone().requires_grad_(), value.cos()) for name, value in weights.items()
        }
        loss = loss_of(layer, leaves, forward_ad.make_dual(x, x.sin()))
        gradients = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
        pairs = [tuple(forward_ad.unpack_dual(value)) for value in gradients]
        rate = forward_ad.unpack_dual(loss).tangent
        return pairs, torch.autograd.grad(rate, leaves)


def _penalty(layer, weights, x):
    """The norm of a gradient, as a loss."""
    return grad(lambda w: grad(lambda x: loss_of(layer, w, x))(x).square().sum())(weights)


TRANSFORMS = {
    "vmap over inputs": lambda f, w, x: vmap(lambda x: outputs_of(f, w, x))(torch.stack((x, x.cos()))),
    "vmap of two levels": lambda f, w, x: vmap(vmap(lambda x: outputs_of(f, w, x), in_dims=2), in_dims=3, out_dims=1)(
        torch.stack([torch.stack((x, x.cos()), 2), torch.stack((x.sin(), x), 2)], 3)
    ),
    "vmap over weights": _backward_through_vmap,
    "vmap over something else": lambda f, w, x: vmap(lambda y: [value * y for value in outputs_of(f, w, x)])(
        x[0, :, 0]
    ),
    "vmap over both": lambda f, w, x: vmap(lambda w, x: outputs_of(f, w, x), out_dims=1)(
        {name: torch.stack((value, value.cos())) for name, value in w.items()}, torch.stack((x, x.cos()))
    ),
    "grad": lambda f, w, x: grad_and_value(lambda w: loss_of(f, w, x))(w),
    "vjp": lambda f, w, x: (lambda y, pull: (y, pull([value.cos() for value in y])))(
        *vjp(lambda w, x: outputs_of(f, w, x), w, x)
    ),
    "gradients of each member": lambda f, w, x: vmap(grad(lambda w, x: loss_of(f, w, x)), in_dims=(None, 0))(
        w, torch.stack((x, x.cos(), x.sin()))
    ),
    "gradients of a vmap": lambda f, w, x: grad(
        lambda w: sum(value.sum() for value in vmap(lambda w: outputs_of(f, w, x))(w))
    )({name: torch.stack((value, value.cos())) for name, value in w.items()}),
    "jacrev": lambda f, w, x: jacrev(lambda x: outputs_of(f, w, x))(x),
    "jvp of inputs": lambda f, w, x: jvp(lambda x: outputs_of(f, w, x), (x,), (x.cos(),)),
    "jvp of weights": lambda f, w, x: jvp(
        lambda w: outputs_of(f, w, x), (w,), ({name: value.cos() for name, value in w.items()},)
    ),
    "jvp of a vmap": lambda f, w, x: jvp(
        vmap(lambda x: outputs_of(f, w, x)), (torch.stack((x, x.cos())),), (torch.stack((x, x.sin())),)
    ),
    "jacfwd": lambda f, w, x: jacfwd(lambda x: outputs_of(f, w, x))(x),
    "dual numbers": _dual,
    "reverse over forward": _reverse_over_forward,
    "gradient of a gradient step": _learnt_in_a_loop,
    "gradients of dual numbers": _dual_gradients,
    "jvp of a gradient": lambda f, w, x: jvp(
        grad(lambda w, x: loss_of(f, w, x), (0, 1)), (w, x), (_cosines(w), x.sin())
    ),
    "jvp of a gradient of inputs": lambda f, w, x: jvp(lambda w: grad(lambda x: loss_of(f, w, x))(x), (w,), (w,)),
    "gradient of a jvp": lambda f, w, x: grad(lambda w: jvp(lambda w: loss_of(f, w, x), (w,), (_cosines(w),))[1])(w),
    "gradient of a gradient": _penalty,
    "products with a Hessian": lambda f, w, x: vmap(lambda v: jvp(grad(lambda x: loss_of(f, w, x)), (x,), (v,))[1])(
        torch.stack((x.sin(), x))
    ),
    "product of weights with their own Hessian": lambda f, w, x: vmap(  # the tangents are the weights themselves
        lambda x: jvp(grad(lambda w: loss_of(f, w, x)), (w,), (w,))
    )(torch.stack((x.sin(), x))),
    "Hessian": lambda f, w, x: hessian(lambda x: loss_of(f, w, x))(x[:2, :1]),
    "jvp of a gradient of members": lambda f, w, x: jvp(
        grad(
            lambda w: sum(value.sin().sum() for value in vmap(lambda x: outputs_of(f, w, x))(torch.stack((x, x.cos()))))
        ),
        (w,),
        (_cosines(w),),
    ),
    "jvp of a pullback": lambda f, w, x: jvp(
        lambda x: vjp(lambda x: outputs_of(f, w, x), x)[1]([value.cos() for value in outputs_of(f, w, x)]), (x,), (x,)
    ),
    "pullbacks of many rows": lambda f, w, x: jvp(jacrev(lambda x: outputs_of(f, w, x)[0][-1, 0]), (x,), (x.cos(),)),
}


def compare(layer: nn.Module, transform: Callable[..., Any], compiled: str = "compiled") -> None:
    layer.requires_grad_(False)
    weights = {name: value.detach() for name, value in layer.named_parameters()}
    x = torch.linspace(-2, 2, 60, dtype=DTYPE).cos().reshape(4, 3, 5)
    results = []
    for runner in ("eager", compiled):
        with fc.runner(runner):
            results.append(tree_leaves(transform(layer, weights, x)))
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


SECOND = ("jvp of a", "products", "product of", "Hessian", "pullbacks")
NESTED = [name for name in TRANSFORMS if name.startswith(SECOND)]
"""Second derivatives, which take the longest to compile: of two layers only."""
BOTH = ("gru", "several outputs")
CASES = [(one, other) for one in LAYERS for other in TRANSFORMS if other not in NESTED or one in BOTH]


@pytest.mark.parametrize(("layer", "transform"), CASES)
def test_results_are_those_of_the_loop(layer: str, transform: str) -> None:
    torch.manual_seed(2)
    compare(LAYERS[layer]().to(DTYPE), TRANSFORMS[transform])


@pytest.mark.parametrize("transform", ["vmap over weights", "gradients of each member", "jvp of weights", "jacfwd"])
def test_weights_that_are_computed_of_others(transform: str) -> None:
    """A gradient of torch.func's own alone runs as the loop then."""
    torch.manual_seed(2)
    compare(fc.Recurrent(Normed()).to(DTYPE), TRANSFORMS[transform], "auto" if "gradients" in transform else "compiled")


@pytest.mark.parametrize("transform", ["vmap over inputs", "vmap over weights", "jvp of inputs", "jacrev"])
def test_rows_of_different_lengths(transform: str) -> None:
    class Padded(fc.Recurrent):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x, lengths=torch.tensor([4, 1, 3]))

    torch.manual_seed(2)
    compare(Padded(fc.GRUCell(5, 4)).to(DTYPE), TRANSFORMS[transform])


@pytest.mark.parametrize("transform", ["vmap over weights", "gradients of each member"])
def test_with_less_memory(transform: str) -> None:
    torch.manual_seed(2)
    with fc.recompute():
        compare(fc.Recurrent(cells.MGUCell(5, 4)).to(DTYPE), TRANSFORMS[transform])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [2, 5])
def test_a_member_has_the_bits_that_it_has_alone(size: int, threads: int) -> None:
    torch.manual_seed(size)
    members = [fc.Recurrent(cells.MGUCell(5, 7)) for _ in range(size)]
    weights, buffers = stack_module_state(members)
    x = torch.randn(size, 9, 3, 5)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with fc.runner("compiled"):
            y, h = vmap(lambda w, b, x: functional_call(members[0], (w, b), (x,)))(weights, buffers, x)
            gradients = torch.autograd.grad(y.sin().sum() + h.sum(), list(weights.values()))
            for place, member in enumerate(members):
                own_y, own_h = member(x[place])
                assert torch.equal(y[place], own_y)
                assert torch.equal(h[place], own_h)
                own = torch.autograd.grad(own_y.sin().sum() + own_h.sum(), list(member.parameters()))
                assert all(torch.equal(one[place], other) for one, other in zip(gradients, own, strict=True))
    finally:
        torch.set_num_threads(before)


def test_what_all_members_share_gets_the_sum_of_their_gradients() -> None:
    torch.manual_seed(3)
    members = [fc.Recurrent(fc.GRUCell(5, 4)).to(DTYPE) for _ in range(3)]
    weights, buffers = stack_module_state(members)
    x = torch.randn(4, 2, 5, dtype=DTYPE, requires_grad=True)
    with fc.runner("compiled"):
        y, _ = vmap(lambda w, b: functional_call(members[0], (w, b), (x,)))(weights, buffers)
        (actual,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(sum(member(x)[0].square().sum() for member in members), x)
    torch.testing.assert_close(actual, expected)


def test_an_ensemble_has_gradients_of_gradients() -> None:
    torch.manual_seed(3)
    members = [fc.Recurrent(fc.GRUCell(5, 4)).to(DTYPE) for _ in range(2)]
    weights, buffers = stack_module_state(members)
    x, results = torch.randn(4, 2, 5, dtype=DTYPE, requires_grad=True), []
    for runner in ("eager", "compiled"):
        with fc.runner(runner):
            y, _ = vmap(lambda w, b: functional_call(members[0], (w, b), (x,)))(weights, buffers)
            (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            results.append(torch.autograd.grad(first.square().sum(), [x, *weights.values()]))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_frozen_weights_of_some_members_only() -> None:
    """One tensor of the members is theirs, all others are shared."""
    torch.manual_seed(4)
    layer = fc.Recurrent(fc.GRUCell(5, 4)).to(DTYPE)
    bias = torch.stack([layer.cell.bias_hh.detach(), layer.cell.bias_hh.detach() + 1]).requires_grad_()
    x, results = torch.randn(4, 2, 5, dtype=DTYPE), []
    for runner in ("eager", "compiled"):
        with fc.runner(runner):
            y, _ = vmap(lambda b: functional_call(layer, {"cell.bias_hh": b}, (x,)))(bias)
            results.append((y, *torch.autograd.grad(y.sin().sum(), [bias, layer.cell.weight_hh])))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


class Dropping(fc.Cell):
    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
        h = nn.functional.dropout(torch.tanh(x + state[0]), 0.5, True)
        return h, (h,)


def test_what_draws_or_is_differentiated_three_times_is_left_to_torch() -> None:
    layer = fc.Recurrent(Dropping(5, 5))
    x = torch.ones(2, 4, 3, 5)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: layer(x)[0])(x)
    assert vmap(lambda x: layer(x)[0], randomness="different")(x).shape == (2, 4, 3, 5)
    gru = fc.Recurrent(fc.GRUCell(5, 4)).to(DTYPE)
    third = grad(lambda x: grad(lambda x: grad(lambda x: gru(x)[0].sin().sum())(x).square().sum())(x).sum())
    with fc.runner("eager"):
        expected = third(x[0, :2].to(DTYPE))
    torch.testing.assert_close(third(x[0, :2].to(DTYPE)), expected)
    with pytest.raises(fc.NotCompilable, match="three times"), fc.runner("compiled"):
        third(x[0, :2].to(DTYPE))


def test_gradients_with_tangents_reach_a_backward_of_plain_numbers() -> None:
    """Of a layer that was called outside of the level: a kernel would leave the tangents out."""
    torch.manual_seed(8)
    layer, x = fc.Recurrent(fc.GRUCell(5, 4)).to(DTYPE), torch.randn(6, 2, 5, dtype=DTYPE)
    scale, results = torch.randn(6, 2, 4, dtype=DTYPE), []
    for runner in ("eager", "compiled", "compiled"):  # the last is a prepared call
        with fc.runner(runner):
            y = layer(x)[0]
        with forward_ad.dual_level():
            loss = (y * forward_ad.make_dual(scale, scale.cos())).sum()
            gradients = torch.autograd.grad(loss, list(layer.parameters()))
            results.append([tuple(forward_ad.unpack_dual(value)) for value in gradients])
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(results[2], results[0], rtol=1e-10, atol=1e-12)


class Readout(fc.Cell):
    """A bias that no tangent depends on; a mask and ids among the buffers, unless plain."""

    def __init__(self, plain: bool) -> None:
        super().__init__(5, 4)
        self.into, self.out, self.plain = nn.Linear(5, 4), nn.Linear(4, 3), plain
        self.output_size = 3
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("order", torch.tensor([2, 0, 1, 3]))

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
        h = torch.tanh(self.into(x) + state[0])
        h = h if self.plain else torch.where(self.mask, h, 0.5 * state[0].index_select(1, self.order))
        return self.out(h), (h,)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(
    "transform", ["gradient of a gradient", "jvp of a gradient", "gradient of a jvp", "gradients of dual numbers"]
)
def test_buffers_and_weights_without_tangents(transform: str, plain: bool) -> None:
    """Numbers are computed of a mask, which torch.func's gradients leave to the loop."""
    torch.manual_seed(7)
    compare(fc.Recurrent(Readout(plain)).to(DTYPE), TRANSFORMS[transform], "compiled" if plain else "auto")


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # by torch's own folding of constants
@pytest.mark.parametrize("layer", LAYERS)
def test_linearize(layer: str) -> None:
    """torch traces the call, in which nothing may change in place."""
    compare(LAYERS[layer]().to(DTYPE), lambda f, w, x: linearize(lambda x: outputs_of(f, w, x), x)[1](x.cos()), "auto")


def test_no_steps_and_no_rows() -> None:
    layer, x = fc.Recurrent(fc.GRUCell(5, 4)).to(DTYPE), torch.randn(6, 2, 5, dtype=DTYPE)
    for empty in (x[:0], x[:, :0]):
        assert torch.equal(grad(lambda x: layer(x)[1].sum())(empty), empty)
        _, rate = jvp(grad(lambda x: layer(x)[1].sum()), (empty,), (empty,))
        assert torch.equal(rate, empty)


def test_third_derivatives_of_gradients_with_tangents() -> None:
    """Of the Parameters that a user's own autograd follows through a product with a Hessian."""
    torch.manual_seed(9)
    layer, x, results = fc.Recurrent(fc.GRUCell(3, 4)).to(DTYPE), torch.randn(3, 2, 3, dtype=DTYPE), []
    weights = dict(layer.named_parameters())
    for runner in ("eager", "compiled"):
        with fc.runner(runner):
            _, product = jvp(grad(lambda w: loss_of(layer, w, x)), (weights,), (_cosines(weights),))
            results.append(torch.autograd.grad(sum(v.square().sum() for v in product.values()), list(weights.values())))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)


def test_weights_that_are_lazily_negated() -> None:
    """A kernel reads memory, which knows nothing of the negation, and members lie at equal distances in it."""
    torch.manual_seed(5)
    layer = fc.Recurrent(fc.GRUCell(5, 4)).to(DTYPE)
    x, results = torch.randn(6, 2, 5, dtype=DTYPE), []
    numbers = torch.randn(3, 12, 4, dtype=torch.complex128)
    for runner in ("eager", "compiled"):
        with fc.runner(runner), torch.no_grad():
            negated = numbers.conj().imag
            assert negated.is_neg()
            results.append(vmap(lambda w: functional_call(layer, {"cell.weight_hh": w}, (x,))[0])(negated))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


class Complex(fc.Cell):
    """A complex weight, and a mask among the buffers."""

    def __init__(self) -> None:
        super().__init__(5, 5)
        self.scale = nn.Parameter(torch.rand(5, dtype=DTYPE))
        self.turn = nn.Parameter(torch.randn(5, dtype=torch.complex128))
        self.register_buffer("mask", torch.tensor([True, False, True, True, False]))

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
        h = torch.where(self.mask, torch.tanh(self.scale * (x * self.turn).real + state[0]), 0.5 * state[0] + x)
        return h, (h,)


@pytest.mark.parametrize("transform", ["jvp of inputs", "jvp of weights", "dual numbers", "vmap over weights"])
def test_complex_weights(transform: str) -> None:
    torch.manual_seed(6)
    compare(fc.Recurrent(Complex()), TRANSFORMS[transform], "auto")


def test_zeros_without_memory_reach_no_kernel() -> None:
    """torch's tangents may be such, and a user may hand one to a layer."""
    layer, zeros = fc.Recurrent(fc.GRUCell(5, 4)), torch._efficientzerotensor((6, 2, 5))
    with torch.no_grad():
        torch.testing.assert_close(layer(zeros)[0], layer(torch.zeros(6, 2, 5))[0])


def test_a_step_is_compiled_inside_of_a_dual_level():
    """torch has one such level at a time, in which a trace of tangents has to do with the caller's."""
    layer, x = fc.GRU(3, 11).double(), torch.randn(5, 2, 3, dtype=torch.float64)
    fc.refresh()  # so that no jvp has compiled it before
    weights = dict(layer.named_parameters())
    with fc.runner("compiled"):
        actual = _dual(layer, weights, x)
    with fc.runner("eager"):
        torch.testing.assert_close(actual, _dual(layer, weights, x), rtol=1e-10, atol=1e-11)
