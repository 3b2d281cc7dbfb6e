"""Inputs that are bools or integers: masks of measurements, padding, pixels, ids. A kernel has them as numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusecell as fc


def _written(cell: Marked, h: Tensor, m: Tensor, before: Tensor) -> Tensor:
    h = h.clone()
    h[m[:, 0]] = before[m[:, 0]] * 2
    h[m & (h > 0)] = 0.3
    return h


def _attended(cell: Marked, h: Tensor, m: Tensor, before: Tensor) -> Tensor:
    memory = torch.stack((h, before), 1)
    mask = torch.stack((m.any(1), ~m.all(1) | m[:, 3]), 1) | torch.tensor([False, True])
    return F.scaled_dot_product_attention(h[:, None], memory, memory, attn_mask=mask[:, None])[:, 0]


Body = Callable[["Marked", Tensor, Tensor, Tensor], Tensor]
BOOLS: dict[str, Body] = {
    "chosen": lambda c, h, m, before: torch.where(m[:, :1], h, before),
    "filled": lambda c, h, m, before: h.masked_fill(~m[:, 1:2], 0.3),
    "joined": lambda c, h, m, before: torch.where(m ^ (h > 0), h, before) * m.logical_not(),
    "written": _written,
    "attended": _attended,
}
NUMBERS: dict[str, Body] = {
    "multiplied": lambda c, h, m, before: h * m + before * (1 - m.to(h.dtype)),
    "counted": lambda c, h, m, before: h * m.sum(-1, keepdim=True) + m.roll(1, 1).to(h.dtype) / 7,
    "compared": lambda c, h, m, before: h * (m == 0) + before * (m != 1),
    "looked up": lambda c, h, m, before: h + c.table(m[:, 2].long()),
}
DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Marked(fc.Cell):
    """A cell with six marks next to its input."""

    inputs = ("x", "marks")

    def __init__(self, body: Body) -> None:
        super().__init__(5, 6)
        self.body = body
        self.inp, self.rec, self.table = nn.Linear(5, 6), nn.Linear(6, 6), nn.Embedding(3, 6)

    def step(self, x: tuple[Tensor, Tensor], state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
        h = torch.tanh(self.inp(x[0]) + self.rec(state[0]))
        h = self.body(self, h, x[1], state[0])
        return h, (h,)


@pytest.mark.parametrize("options", [{}, {"lengths": [5, 3, 0, 2], "reverse": True}], ids=["plain", "lengths"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bool) for name in (*BOOLS, *NUMBERS)), *((name, dtype) for name in NUMBERS for dtype in DTYPES)],
)
def test_numbers_are_those_of_the_loop(name: str, dtype: torch.dtype, options: dict) -> None:
    torch.manual_seed(0)
    cell = Marked((BOOLS | NUMBERS)[name]).double()
    x = torch.randn(5, 4, 5, dtype=torch.float64, requires_grad=True)
    marks = (torch.rand(5, 4, 6) > 0.5).to(dtype)
    results = []
    for runner in ("compiled", "eager"):
        with fc.runner(runner):
            y, h = fc.scan(cell, (x, marks), **options)
        gradients = torch.autograd.grad(y.square().sum() + h.sum(), [x, *cell.parameters()], allow_unused=True)
        results.append((y, h, *gradients))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def test_integers_that_float32_has_not_run_as_the_loop() -> None:
    cell = Marked(NUMBERS["compared"])
    marks = torch.full((2, 1, 6), 2**24 + 1, dtype=torch.int32)
    with pytest.raises(fc.NotCompilable, match="An input has integers up to 16,777,217"), fc.runner("compiled"):
        fc.scan(cell, (torch.ones(2, 1, 5), marks))


def test_tapes_masks_and_truncated_gradients_take_them() -> None:
    layer, x, marks = fc.Recurrent(Marked(BOOLS["filled"])), torch.randn(5, 4, 5), torch.rand(5, 4, 6) > 0.5
    y, _ = layer((x, marks))
    torch.testing.assert_close(fc.record(layer, (x, marks)).value("output"), y)
    results = []
    for runner in ("compiled", "eager"):
        with fc.runner(runner):
            results.append(fc.scan(layer.cell, (x, marks), mask=torch.arange(20).reshape(5, 4) % 3 > 0, tbptt=2)[0])
    torch.testing.assert_close(*results)
