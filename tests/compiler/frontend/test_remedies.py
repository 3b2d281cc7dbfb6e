"""What refusals say to write instead: it is compiled, and computes the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

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
    "linalg_matrix_exp": (lambda x: torch.matrix_exp(x[:, :9].view(-1, 3, 3) * 0.1), _power_series),
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


@pytest.mark.parametrize("name", [name for name in INSTEAD if name != "masked_scatter"])
def test_refusals_say_it(name: str) -> None:
    with pytest.raises(fc.NotCompilable) as refusal, fc.runner("compiled"):
        fc.scan(Applying(INSTEAD[name][0]), torch.randn(3, 2, 12, dtype=torch.float64))
    assert REMEDIES[name].rstrip(".") in str(refusal.value)
