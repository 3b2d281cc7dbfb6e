"""``y[mask] = f(x[mask])``: elements that a mask picks, computed with, and written back at the same mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fusecell as fc


class Masking(fc.Cell):
    """A cell of six units that does something by a mask."""

    def __init__(self, name: str) -> None:
        super().__init__(6, 6)
        self.name = name
        self.w = nn.Parameter(torch.randn(6))
        self.gru, self.linear, self.norm = nn.GRUCell(6, 6), nn.Linear(12, 6), nn.LayerNorm(6)

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
        h = STEPS[self.name](self, x, torch.tanh(x + state[0] * self.w))
        return h, (h,)


def _negated(cell: Masking, x: Tensor, h: Tensor) -> Tensor:
    h = h.clone()
    h[h > 0] = -2 * h[h > 0]
    return h


def _scaled(cell: Masking, x: Tensor, h: Tensor) -> Tensor:
    h = h.clone()
    h[x > 0] *= 0.5
    return h


def _two_masks(cell: Masking, x: Tensor, h: Tensor) -> Tensor:
    y, mask = torch.zeros_like(h), x > 0
    y[mask] = h[mask]
    y[~mask] = x[~mask].sin()
    return y


def _rows(cell: Masking, x: Tensor, h: Tensor) -> Tensor:
    h, active = h.clone(), x[:, 0] > 0
    h[active] = (h[active] * cell.w + 1).tanh()
    return h


def _cell_on_rows(cell: Masking, x: Tensor, h: Tensor) -> Tensor:
    new, active = h.clone(), x[:, 0] > 0
    new[active] = cell.gru(x[active], h[active])
    return new


def _norm_on_rows(cell: Masking, x: Tensor, h: Tensor) -> Tensor:
    new, active = h * 0.5, x[:, 0] > 0
    new[active] = cell.norm(torch.tanh(cell.linear(torch.cat((x[active], h[active]), -1))))
    return new


def _parts_of_rows(cell: Masking, x: Tensor, h: Tensor) -> Tensor:
    new, active = h * 0.5, h.sum(-1) > 0
    a, b = cell.linear(torch.cat((x[active], h[active]), -1)).chunk(2, -1)
    new[active] = torch.cat((b, torch.softmax(a, -1)), 1)
    return new


def _experts(cell: Masking, x: Tensor, h: Tensor) -> Tensor:
    weight, place = torch.softmax(cell.linear(torch.cat((x, h), -1))[:, :2], -1).max(-1)
    new = torch.zeros_like(h)
    for number, expert in enumerate((cell.norm, torch.sin)):
        chosen = place == number
        new[chosen] = weight[chosen].unsqueeze(-1) * expert(h[chosen]) + x[chosen, 2:3]
    return new


def _columns_of_masks(cell: Masking, x: Tensor, h: Tensor) -> Tensor:
    new, masks = h * 0.5, x > 0
    for column in (0, 4):
        new[masks[:, column]] = h[masks[:, column]].cos()
    return new


STEPS = {
    step.__name__.strip("_"): step
    for step in (
        _negated,
        _scaled,
        _two_masks,
        _rows,
        _cell_on_rows,
        _norm_on_rows,
        _parts_of_rows,
        _experts,
        _columns_of_masks,
    )
}


def _written_elsewhere(masks: Tensor, h: Tensor) -> Tensor:
    new = h.clone()
    new[masks[:, 0]] = h[masks[:, 1]]
    return new


@pytest.mark.parametrize("name", STEPS)
def test_the_numbers_are_those_of_the_loop(name: str) -> None:
    torch.manual_seed(0)
    cell = Masking(name).double()
    x = torch.randn(5, 3, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for runner in ("compiled", "eager"):
        with fc.runner(runner):
            y, _ = fc.scan(cell, x)
            gradients = torch.autograd.grad(y.sin().sum(), [x, *cell.parameters()], allow_unused=True)
            results.append((y, *gradients))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("summed", lambda cell, x, h: h + h[x > 0].sum()),
        ("mean of picked rows", lambda cell, x, h: h + h[x[:, 0] > 0].mean(0)),
        ("another column of masks", lambda cell, x, h: _written_elsewhere(x > 0, h)),
        ("another mask", lambda cell, x, h: torch.zeros_like(h).masked_scatter(x > 0, h[h > 0])),
    ],
)
def test_what_depends_on_how_many_are_picked_is_refused(name: str, step, monkeypatch) -> None:
    monkeypatch.setitem(STEPS, name, step)
    with pytest.raises(fc.NotCompilable), fc.runner("compiled"):
        fc.scan(Masking(name), torch.ones(4, 3, 6))


class MaskedByRows(fc.Cell):
    """A cell that computes with picked rows and with all of them, which fits for a mask of all rows only."""

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
        h, mask = state[0].clone(), x[:, 0] > 0
        h[mask] = h[mask] + x
        return h, (h,)


def test_picked_rows_next_to_all_rows_raise_as_in_torch() -> None:
    with pytest.raises(fc.NotCompilable, match="picks elements by a mask"), fc.runner("compiled"):
        fc.scan(MaskedByRows(6, 6), torch.randn(4, 3, 6))
    with pytest.raises(RuntimeError, match="must match"), pytest.warns(fc.EagerWarning):
        fc.scan(MaskedByRows(6, 6), torch.linspace(-1, 1, 72).reshape(4, 3, 6))
