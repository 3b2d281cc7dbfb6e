"""What refusals say to write instead: it is compiled, and computes the same."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fusecell as fc
from fusecell.compiler.frontend.remedies import REMEDIES

Body = Callable[[Tensor], Tensor]


class Applying(fc.Cell):
    """A cell of 12 features whose step is a function of its input."""

    def __init__(self, body: Body) -> None:
        super().__init__(12, 12)
        self.body = body

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.body(x + state[0] * 0.1).flatten(1).repeat(1, 12)[:, :12], (x,)


def tall(x: Tensor) -> Tensor:
    return x.view(-1, 4, 3) + torch.eye(4, 3, dtype=x.dtype)


def _masked_within_rows(x: Tensor) -> Tensor:
    mask, source = x > 0, x.flip(1)
    return torch.where(mask, source.gather(1, (mask.cumsum(1) - 1).clamp(min=0)), x)


def _by_qr(x: Tensor) -> Tensor:
    q, r = torch.linalg.qr(tall(x))
    signs = r.diagonal(dim1=1, dim2=2).sign()[:, None]
    return torch.cat((q * signs, r * signs.mT), 1)


def _by_cholesky(x: Tensor) -> Tensor:
    r = torch.linalg.cholesky(tall(x).mT @ tall(x)).mT
    return torch.cat((torch.linalg.solve_triangular(r, tall(x), upper=True, left=False), r), 1)


def _power_series(x: Tensor) -> Tensor:
    b = x[:, :9].view(-1, 3, 3) * 0.1 / 64
    return torch.linalg.matrix_power(torch.eye(3, dtype=x.dtype) + b + b @ b / 2 + b @ b @ b / 6, 64)


def symmetric(x: Tensor, size: int) -> Tensor:
    """Matrices with a gap between the eigenvalues, all of them positive."""
    a = x[:, : size * size].view(-1, size, size)
    return a @ a.mT + torch.diag(torch.arange(size, dtype=x.dtype) * 400)


def _largest_eigenpair(x: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric(x, 3))
    return torch.cat((values[:, -1:], (vectors[:, :, -1] ** 2)), 1)


def _power_iteration(x: Tensor) -> Tensor:
    a = symmetric(x, 3)
    v = torch.ones_like(a[:, :, :1])
    for _ in range(40):
        v = F.normalize(a @ v, dim=1)
    return torch.cat((v.mT @ a @ v, v**2), 1).flatten(1)


def _largest_singular_value(x: Tensor) -> Tensor:
    a = symmetric(x, 3)[:, :2]
    v = torch.ones_like(a[:, 0, :, None])
    for _ in range(40):
        v = F.normalize(a.mT @ (a @ v), dim=1)
    return (a @ v).norm(dim=1)


def _of_two_by_two(x: Tensor) -> Tensor:
    a, b, c, d = symmetric(x, 2).flatten(1).unbind(1)
    root = torch.sqrt((a - d) ** 2 / 4 + b * c)
    by_hypot = torch.hypot((a - d) / 2, b)
    return torch.stack(((a + d) / 2 - root, (a + d) / 2 + by_hypot), 1)


def _in_the_unit_interval(x: Tensor) -> Tensor:
    return x.sigmoid() * 3 + 0.2


def _poisson(x: Tensor) -> Tensor:
    return torch.exp(-x) * sum(x**k / math.factorial(k) for k in range(3))


EDGES = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
INSTEAD: dict[str, tuple[Body, Body]] = {
    "masked_scatter": (
        lambda x: torch.cat([row.masked_scatter(row > 0, row.flip(1)) for row in x.split(1)]),
        _masked_within_rows,
    ),
    "mode": (
        lambda x: torch.mode(x, 1, keepdim=True)[0].sin(),
        lambda x: x.gather(1, (x[:, :, None] == x[:, None]).sum(2).argmax(1, keepdim=True)).sin(),
    ),
    "linalg_qr": (_by_qr, _by_cholesky),
    "linalg_pinv": (
        lambda x: torch.linalg.pinv(tall(x)),
        lambda x: torch.linalg.solve(tall(x).mT @ tall(x), tall(x).mT),
    ),
    "linalg_lstsq": (
        lambda x: torch.linalg.lstsq(tall(x), x[:, :4, None]).solution,
        lambda x: torch.linalg.solve(tall(x).mT @ tall(x), tall(x).mT @ x[:, :4, None]),
    ),
    "_linalg_eigh": (_largest_eigenpair, _power_iteration),
    "linalg_eig": (
        lambda x: torch.linalg.eig(symmetric(x, 2)).eigenvalues.real.sort(1).values,
        _of_two_by_two,
    ),
    "_linalg_svd": (lambda x: torch.linalg.svdvals(symmetric(x, 3)[:, :2])[:, :1], _largest_singular_value),
    "igamma": (
        lambda x: torch.special.gammainc(
            torch.tensor([3.0, 0.5]).to(x.dtype)[:, None], _in_the_unit_interval(x)[:, None]
        ),
        lambda x: torch.stack((1 - _poisson(_in_the_unit_interval(x)), torch.erf(_in_the_unit_interval(x).sqrt())), 1),
    ),
    "igammac": (
        lambda x: torch.special.gammaincc(torch.full_like(x, 3.0), _in_the_unit_interval(x)),
        lambda x: _poisson(_in_the_unit_interval(x)),
    ),
    "special_zeta": (
        lambda x: torch.special.zeta(torch.full_like(x, 3.0), _in_the_unit_interval(x)),
        lambda x: torch.polygamma(3 - 1, _in_the_unit_interval(x)) * (-1) ** 3 / math.factorial(3 - 1),
    ),
    "histc": (
        lambda x: torch.stack([row.clamp(-1, 0.99).histc(4, -1.0, 1.0) for row in x]),
        lambda x: (
            (x.clamp(-1, 0.99)[:, :, None] >= EDGES[:-1]).logical_and(x.clamp(-1, 0.99)[:, :, None] < EDGES[1:]).sum(1)
        ).to(x.dtype),
    ),
    "bincount": (
        lambda x: torch.stack([row.bincount(minlength=4) for row in x.abs().long().clamp(max=3)]).to(x.dtype),
        lambda x: F.one_hot(x.abs().long().clamp(max=3), 4).sum(1).to(x.dtype),
    ),
    "masked_select": (
        lambda x: torch.stack([row.masked_select(row > 0).sum() for row in x])[:, None],
        lambda x: torch.where(x > 0, x, 0).sum(1, keepdim=True),
    ),
    "nonzero": (
        lambda x: torch.stack([row.round().nonzero().sum() for row in x])[:, None].to(x.dtype),
        lambda x: torch.where(x.round() != 0, torch.arange(12), 0).sum(1, keepdim=True).to(x.dtype),
    ),
    "_unique2": (
        lambda x: torch.stack([torch.tensor(len(row.unique())) for row in x])[:, None].to(x.dtype),
        lambda x: ((y := x.sort(1).values)[:, 1:] != y[:, :-1]).sum(1, keepdim=True).to(x.dtype) + 1,
    ),
    "dist": (
        lambda x: torch.stack([torch.dist(row, row.sin()) for row in x])[:, None],
        lambda x: (x - x.sin()).norm(dim=-1, keepdim=True),
    ),
    "linalg_matrix_exp": (lambda x: torch.matrix_exp(x[:, :9].view(-1, 3, 3) * 0.1), _power_series),
}


OF_ROWS = ("masked_scatter", "dist", "histc", "bincount", "masked_select", "nonzero", "_unique2")
"""Those that are called row by row above, for the numbers of each: the step is refused for that."""
OVER_ROWS: dict[str, Body] = {
    "dist": lambda x: torch.dist(x, x.sin()) + x,
    "histc": lambda x: x.histc(4, -1.0, 1.0) + x[:, :4],
    "bincount": lambda x: x.abs().long().flatten().bincount(minlength=12)[:12] + x,
    "masked_select": lambda x: x.masked_select(x > 0).sum() + x,
    "nonzero": lambda x: x.nonzero().sum() + x,
    "_unique2": lambda x: x.unique().sum() + x,
}


@pytest.mark.parametrize("name", INSTEAD)
def test_what_to_write_instead_computes_the_same(name: str) -> None:
    refused, instead = INSTEAD[name]
    torch.manual_seed(0)
    x = torch.randn(3, 2, 12, dtype=torch.float64)
    x[..., :5] = x[..., 5:6]  # the most frequent element
    x[..., 3] += 1
    with fc.runner("eager"):
        expected = fc.scan(Applying(refused), x)[0]
    with fc.runner("compiled"):
        torch.testing.assert_close(fc.scan(Applying(instead), x)[0], expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in INSTEAD if name not in OF_ROWS])
def test_refusals_say_it(name: str) -> None:
    with pytest.raises(fc.NotCompilable) as refusal, fc.runner("compiled"):
        fc.scan(Applying(INSTEAD[name][0]), torch.randn(3, 2, 12, dtype=torch.float64))
    assert REMEDIES[name].rstrip(".") in str(refusal.value)


@pytest.mark.parametrize("name", OVER_ROWS)
def test_refusals_of_what_joins_rows_say_it(name: str) -> None:
    with pytest.raises(fc.NotCompilable) as refusal, fc.runner("compiled"):
        fc.scan(Applying(OVER_ROWS[name]), torch.randn(3, 2, 12, dtype=torch.float64))
    assert REMEDIES[name].rstrip(".") in str(refusal.value)


def test_batch_norm_in_training() -> None:
    class Normed(fc.Cell):
        def __init__(self) -> None:
            super().__init__(12, 12)
            self.norm = torch.nn.BatchNorm1d(12)

        def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
            h = torch.tanh(self.norm(x) + state[0])
            return h, (h,)

    cell, x = Normed(), torch.randn(3, 2, 12)
    with pytest.raises(fc.NotCompilable, match=r"which mixes its rows.*LayerNorm"), fc.runner("compiled"):
        fc.scan(cell, x)
    with fc.runner("compiled"):
        assert fc.scan(cell.eval(), x)[0].isfinite().all()


SAMPLES: dict[str, tuple[Body, Body]] = {
    "binomial": (
        lambda p: torch.binomial(torch.full_like(p, 5.0), p),
        lambda p: (torch.rand(*p.shape, 5) < p[..., None]).sum(-1).to(p.dtype),
    ),
    "_standard_gamma": (
        lambda rate: torch.distributions.Gamma(3.0, rate, validate_args=False).sample(),
        lambda rate: -torch.rand(*rate.shape, 3).log().sum(-1) / rate,
    ),
    "_sample_dirichlet": (
        lambda p: torch.distributions.Dirichlet(torch.full_like(p, 2.0), validate_args=False).sample(),
        lambda p: (g := -torch.rand(*p.shape, 2).log().sum(-1)) / g.sum(-1, keepdim=True),
    ),
}


class Sampling(fc.Cell):
    """A cell whose output is drawn."""

    states = ()

    def __init__(self, body: Body) -> None:
        super().__init__(12, 12)
        self.body = body

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.body(x), ()


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_have_the_distribution(name: str) -> None:
    refused, instead = SAMPLES[name]
    x = torch.full((10, 500, 12), 0.3)
    with pytest.raises(fc.NotCompilable, match=r"torch\.rand\("), fc.runner("compiled"):
        fc.scan(Sampling(refused), x)
    with fc.runner("compiled"):
        drawn = fc.scan(Sampling(instead), x)[0]
    expected = refused(x)
    torch.testing.assert_close(drawn.mean(), expected.mean(), rtol=0.02, atol=0)
    torch.testing.assert_close(drawn.std(), expected.std(), rtol=0.03, atol=0)


class Drawing(fc.Cell):
    """A leaky ReLU whose slopes are drawn, by torch's own function or by what its refusal says."""

    states = ()

    def __init__(self, *, own: bool) -> None:
        super().__init__(12, 12)
        self.own = own

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not self.own:
            return F.rrelu(x, training=True), ()
        slope = torch.empty_like(x).uniform_(1 / 8, 1 / 3)
        return torch.where(x > 0, x, x * slope), ()


def test_random_slopes() -> None:
    x, results = torch.randn(3, 200, 12), []
    with pytest.raises(fc.NotCompilable, match=r"uniform_\(1 / 8, 1 / 3\)"), fc.runner("compiled"):
        fc.scan(Drawing(own=False), x)
    for runner in ("compiled", "eager"):
        torch.manual_seed(1)  # not that of x
        with fc.runner(runner):
            results.append(fc.scan(Drawing(own=True), x)[0])
    torch.testing.assert_close(*results)
    torchs = F.rrelu(x, training=True)
    assert abs(float(results[0][x < 0].mean() - torchs[x < 0].mean())) < 0.01


class Expanded(fc.Cell):
    """A weight as an input of the step, where its gradient may have any form."""

    inputs = ("x", "weight")

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.weight = torch.nn.Parameter(torch.randn(6, dtype=torch.float64))

    def draw(self, steps: int, batch_size: int, **_: object) -> tuple[Tensor, ...]:
        return (self.weight.expand(1, batch_size, -1),)

    def step(self, x: tuple[Tensor, Tensor], state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
        h = torch.tanh(x[0] + state[0] * x[1].sort(1).values)
        return h, (h,)


def test_a_weight_may_be_an_input() -> None:
    cell, x, results = Expanded(), torch.randn(4, 3, 6, dtype=torch.float64), []
    for runner in ("compiled", "eager"):
        with fc.runner(runner):
            y, _ = fc.scan(cell, x)
        results.append((y, *torch.autograd.grad(y.sin().sum(), cell.weight)))
    torch.testing.assert_close(*results)
