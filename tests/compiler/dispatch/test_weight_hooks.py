"""Hooks of torch.nn.utils that compute a weight before a module: compiled, and left as the loop leaves them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fusecell as fc

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.*` is deprecated")


class Hooked(fc.Cell):
    """A cell of two linear maps and a gain."""

    def __init__(self) -> None:
        super().__init__(5, 7)
        self.inp, self.rec = nn.Linear(5, 7), nn.Linear(7, 7)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 7))

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
        h = torch.tanh(self.inp(x) + self.rec(state[0]) * self.gain)
        return h.sin(), (h,)


def _pruned_twice(cell: Hooked) -> None:
    prune.random_unstructured(cell.rec, "weight", 0.3)
    prune.ln_structured(cell.rec, "weight", 2, n=2, dim=0)
    prune.l1_unstructured(cell.inp, "bias", 2)


HOOKS: dict[str, Callable[[Hooked], object]] = {
    "pruned": lambda cell: prune.l1_unstructured(cell.rec, "weight", 0.4),
    "pruned twice": _pruned_twice,
    "weight_norm": lambda cell: nn.utils.weight_norm(cell.rec),
    "spectral_norm": lambda cell: nn.utils.spectral_norm(cell.inp).eval(),
    "of the cell itself": lambda cell: prune.l1_unstructured(cell, "gain", 3),
}


def _loop(cell: Hooked, x: Tensor) -> Tensor:
    for hook in cell._forward_pre_hooks.values():
        hook(cell, ())
    state: tuple[Tensor, ...] = (x.new_zeros(x.shape[1], 7),)
    outputs = []
    for row in x:
        y, state = cell.step(row, state)
        outputs.append(y)
    return torch.stack(outputs)


@pytest.mark.parametrize("name", HOOKS)
def test_training_is_that_of_the_loop(name: str) -> None:
    torch.manual_seed(0)
    cell = Hooked().double()
    HOOKS[name](cell)
    layer, x = fc.Recurrent(cell), torch.randn(6, 3, 5, dtype=torch.float64)
    for _ in range(3):
        expected = _loop(cell, x)
        parameters = list(cell.parameters())
        gradients = torch.autograd.grad(expected.square().sum(), parameters)
        with fc.runner("compiled"):
            actual = layer(x)[0]
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        for got, wanted in zip(torch.autograd.grad(actual.square().sum(), parameters), gradients, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(0.1 * gradient)


def test_the_weight_is_left_as_the_parameters_are_and_a_stream_has_the_bits() -> None:
    cell, x = Hooked(), torch.linspace(-1, 1, 20).reshape(4, 1, 5)
    prune.l1_unstructured(cell.rec, "weight", 0.4)
    with torch.no_grad():
        cell.rec.weight_orig.mul_(0.5)
        y, _ = fc.Recurrent(cell)(x)
    assert torch.equal(cell.rec.weight, cell.rec.weight_orig * cell.rec.weight_mask)
    stream = fc.Stream(cell)
    for row, expected in zip(x, y, strict=True):
        assert torch.equal(torch.as_tensor(stream.step(row[0].numpy())), expected[0])


def test_another_hook_of_the_same_kind_is_another_step() -> None:
    cell, x = Hooked(), torch.linspace(-1, 1, 20).reshape(4, 1, 5)
    nn.utils.weight_norm(cell.rec, dim=0)
    fc.Recurrent(cell)(x)
    hook = next(iter(cell.rec._forward_pre_hooks.values()))
    hook.dim = -1
    cell.rec.weight_g = nn.Parameter(torch.tensor(2.0))
    with torch.no_grad():
        torch.testing.assert_close(fc.Recurrent(cell)(x)[0], _loop(cell, x))


def test_power_iterations_in_training_run_as_the_loop() -> None:
    cell = Hooked()
    nn.utils.spectral_norm(cell.inp)
    before = cell.inp.weight_u.clone()
    with pytest.warns(fc.EagerWarning, match=r"changes self\.inp\.weight_v in place"):
        fc.Recurrent(cell)(torch.randn(4, 2, 5))
    assert not torch.equal(cell.inp.weight_u, before)
