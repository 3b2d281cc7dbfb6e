"""Operations of torch where values or shapes are special, compiled and in the Python loop; and what is refused."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusecell as fc
from tests.compiler.axis_cells import fit

Body = Callable[[Tensor, Tensor], Tensor]
SPECIAL = [
    [1.0, 2.0, math.nan, 3.0, 4.0, math.nan],
    [math.nan, 3.0, 2.0, 3.0, -math.inf, 1.0],
    [0.5, -0.0, math.inf, -1.0, 0.0, 2.0],
    [-5.0, -5.0, 2.0, 7.0, 7.0, 1.0],
]


class Applying(fc.Cell):
    """A cell of six numbers whose step is a function of its input and a parameter, and of no state."""

    def __init__(self, body: Body) -> None:
        super().__init__(6, 24)
        self.body = body
        self.w = nn.Parameter(torch.linspace(-1, 1, 30, dtype=torch.float64).view(5, 6))

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return fit(self.body(x, self.w)), state


def with_gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    inputs = x.clone().requires_grad_()
    y, _ = layer(inputs)
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad((y * weights).sum(), [inputs, *layer.parameters()], materialize_grads=True)]


def both(results: tuple[Tensor, Tensor]) -> Tensor:
    """Join values and positions."""
    return torch.cat([result.flatten(1) for result in results], 1)


def larger(x: Tensor) -> Tensor:
    """Matrices of 5 x 5 in which neither half is zero."""
    x = x[:, :5]
    return torch.diag_embed(x.square() + 2) + x[:, None] * 0.1 + x[:, :, None] * 0.2


OF_ANY_NUMBER: dict[str, Body] = {
    "median": lambda x, w: both(torch.median(x, 1, keepdim=True)),
    "median_of_columns": lambda x, w: both(torch.median(x.view(-1, 3, 2), 1, keepdim=True)),
    "cummax": lambda x, w: both(torch.cummax(x, 1)),
    "cummin": lambda x, w: both(torch.cummin(x.view(-1, 3, 2), 1)),
    "maximum_of_one": lambda x, w: both(torch.max(x.view(-1, 6, 1), 2)),
    "place_of_the_least_of_one": lambda x, w: x[:, 3:4].argmin(1, keepdim=True) + x,
    "number_as_imaginary_part": lambda x, w: torch.view_as_real(torch.complex(x, w[0, 0])).flatten(1),
    "number_as_real_part": lambda x, w: torch.view_as_real(torch.complex(w[0, 1], x)).flatten(1),
    "a_cut_of_a_weight_beside_rows": lambda x, w: torch.cat((w.expand(len(x), 5, 6).flatten(1), x), 1)[:, 2:20].sin(),
    "largest_in_images_of_all_rows": lambda x, w: F.max_pool1d(x.reshape(-1, 1, 3), 2, 1).view(-1, 4),
    "nan_to_num_of_integers": lambda x, w: x.nan_to_num(0.0, 3.0, -3.0).long().nan_to_num().bool().nan_to_num() * x,
    "angle": lambda x, w: x.angle() * x.sin() + x.clone().conj_physical_(),
    "copies": lambda x, w: torch.cat(
        (torch.view_copy(x, (-1, 6)), *torch.split_copy(x, 3, 1), torch.narrow_copy(x, 1, 2, 3)), 1
    ),
}
OF_FINITE_NUMBERS: dict[str, Body] = {
    "cholesky_inverse": lambda x, w: torch.cholesky_inverse(larger(x)).flatten(1),
    "cholesky_solve": lambda x, w: torch.cholesky_solve(x[:, :5, None], larger(x), upper=True).flatten(1),
    "cholesky_by_its_old_name": lambda x, w: torch.cholesky(larger(x) @ larger(x).mT).flatten(1),
    "cross": lambda x, w: torch.cross(x.view(-1, 2, 3), w[:2, :3].expand(len(x), 2, 3), dim=-1).flatten(1),
    "multigammaln": lambda x, w: torch.mvlgamma(x.abs() + 3, 3),
    "soft_margin_loss": lambda x, w: F.soft_margin_loss(x, w[0].detach().sign().expand_as(x), reduction="none"),
    "stft": lambda x, w: torch.view_as_real(torch.stft(x, 4, window=w[0, :4], return_complex=True)).flatten(1),
    "istft": lambda x, w: torch.istft(
        torch.stft(x, 4, 2, window=w[0, :4] + 2, return_complex=True) * (1 + 2j), 4, 2, window=w[0, :4] + 2, length=8
    ),
    "stft_of_all": lambda x, w: (
        x.stft(4, 2, 3, center=False, normalized=True, onesided=False, return_complex=True, window=w[0, :3])
        .abs()
        .flatten(1)
    ),
}


@pytest.mark.filterwarnings("ignore:A window was not provided", "ignore:torch.cholesky is deprecated")
@pytest.mark.parametrize("name", [*OF_ANY_NUMBER, *OF_FINITE_NUMBERS])
def test_they_compute_what_the_loop_does(name: str) -> None:
    x = torch.tensor(SPECIAL, dtype=torch.float64)[None]
    if name in OF_FINITE_NUMBERS:
        x = torch.randn(2, 4, 6, dtype=torch.float64)
    layer = fc.Recurrent(Applying({**OF_ANY_NUMBER, **OF_FINITE_NUMBERS}[name])).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error", fc.EagerWarning)
        compiled = with_gradients(layer, x)
    with fc.runner("eager"):
        expected = with_gradients(layer, x)
    for value, other in zip(compiled, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize(
    ("body", "remedy"),
    [
        (lambda x, w: torch.heaviside(x, w[0]), r"gradient of heaviside.*x\.detach\(\)"),
        (lambda x, w: torch.cross(x.view(-1, 2, 3), x.view(-1, 2, 3).sin()).flatten(1), "give it dim=-1"),
        (lambda x, w: x.as_strided((len(x), 2, 4), (6, 2, 1)).flatten(1), r"x\.unfold\(dim, size, step\)"),
    ],
    ids=["heaviside", "cross", "as_strided"],
)
def test_refusals_say_what_to_write(body: Body, remedy: str) -> None:
    cell = Applying(body)
    cell.w = nn.Parameter(cell.w.detach().float())
    assert any(re.search(remedy, reason) for reason in fc.explain(cell).reasons)
