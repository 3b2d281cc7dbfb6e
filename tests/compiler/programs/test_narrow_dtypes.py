"""Steps that go through narrower dtypes: integers of 8 and 16 bits wrap around, sums of rounded numbers are rounded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusecell as fc

Function = Callable[[Tensor, Tensor], Tensor]
WIDTH = 7


class Through(fc.Cell):
    """A cell whose step is a function of the input and the state."""

    def __init__(self, function: Function) -> None:
        super().__init__(WIDTH, WIDTH)
        self.function = function
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
        h = self.function(x, state[0]).to(x.dtype) * self.gain + 0.5 * x
        return h, (h,)


def both(function: Function, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the output and the gradients, compiled and by the loop."""
    cell, results = Through(function).to(x.dtype), []
    for runner in ("compiled", "eager"):
        leaf = x.clone().requires_grad_()
        with fc.runner(runner):
            y, _ = fc.scan(cell, leaf)
        results.append([y, *torch.autograd.grad(y.sin().sum(), [leaf, cell.gain])])
    return results[0], results[1]


INTEGERS: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "cast": lambda x, d: (64 * x).to(d),
    "of_integers": lambda x, d: (64 * x).long().to(d),
    "of_others": lambda x, d: (64 * x).to(torch.int16).to(d),
    "sum": lambda x, d: (64 * x).to(d) + (32 * x).to(d) - 100,
    "product": lambda x, d: (16 * x).to(d) * (4 * x).to(d),
    "negated": lambda x, d: -(64 * x).to(d),
    "quotient": lambda x, d: (64 * x).to(d) // 7 + (64 * x).to(d) % 5,
    "bits": lambda x, d: (64 * x).to(d) & 0x55 | (8 * x).to(d) ^ 3,
    "shifted": lambda x, d: (16 * x).to(d) << 2,
    "chosen": lambda x, d: torch.where(x > 0, (64 * x).to(d), (32 * x).to(d)).clamp(3, 90),
    "largest": lambda x, d: (64 * x).to(d).amax(-1, keepdim=True) + (64 * x).to(d).flip(-1),
    "total": lambda x, d: (64 * x).to(d).sum(-1, keepdim=True) + (64 * x).to(d).cumsum(-1),
    "moved": lambda x, d: torch.cat([(64 * x).to(d)[:, 3:], (64 * x).to(d)[:, :3]], 1).gather(1, (x > 0).long()),
    "compared": lambda x, d: ((64 * x).to(d) > 50) * 3,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("narrow", [torch.int8, torch.uint8, torch.int16], ids=str)
@pytest.mark.parametrize("name", INTEGERS)
def test_integers_wrap_around_as_torchs(name: str, narrow: torch.dtype, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(5, 3, WIDTH, dtype=torch.float64) * (4 if narrow != torch.int16 else 60)).to(dtype)
    compiled, eager = both(lambda x, h: INTEGERS[name](x, narrow).to(x.dtype) / 16 + h / 4, x)
    for got, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4 if dtype == torch.float32 else 1e-11, atol=1e-5)


@pytest.mark.parametrize("narrow", [torch.int8, torch.uint8, torch.int16], ids=str)
def test_whole_numbers_of_all_sizes(narrow: torch.dtype) -> None:
    """Casts of numbers up to 2^31, beyond which torch's own are undefined."""
    x = torch.cat([torch.arange(-70_000, 70_000, 997.25), 2.0 ** torch.arange(31), -(2.0 ** torch.arange(31))])
    x = torch.cat([x, x[: -len(x) % WIDTH]]).view(-1, WIDTH)
    with torch.no_grad(), fc.runner("compiled"):
        y, _ = fc.scan(Through(lambda x, h: x.to(narrow)), x[None])
    expected = x.to(narrow) * torch.linspace(0.5, 1.5, WIDTH) + 0.5 * x
    assert torch.equal(y[0], expected)


REDUCED: dict[str, Function] = {
    "sum": lambda x, h: (x + h).sum(-1, keepdim=True) / 8,
    "mean": lambda x, h: (x * h).mean(-1, keepdim=True) + x,
    "variance": lambda x, h: (x + h).var(-1, keepdim=True),
    "norm": lambda x, h: (x + h).norm(dim=-1, keepdim=True),
    "softmax": lambda x, h: torch.softmax(x + h, -1),
    "log_softmax": lambda x, h: torch.log_softmax(x + h, -1),
    "logsumexp": lambda x, h: torch.logsumexp(x + h, -1, keepdim=True),
    "layer_norm": lambda x, h: F.layer_norm(x + h, (WIDTH,)),
    "cumsum": lambda x, h: (x + h).cumsum(-1),
    "largest": lambda x, h: (x + h).amax(-1, keepdim=True) * x.max(-1, keepdim=True).values,
}
CASTS = [(torch.float64, torch.float32), (torch.float64, torch.float16), (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("dtype", "narrow"), CASTS, ids=str)
@pytest.mark.parametrize("name", REDUCED)
def test_reductions_in_a_narrower_dtype(name: str, dtype: torch.dtype, narrow: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, WIDTH, dtype=dtype)
    compiled, eager = both(lambda x, h: REDUCED[name](x.to(narrow), (h / 4).to(narrow)).to(x.dtype), x)
    unit = torch.finfo(narrow).eps
    for got, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, expected, rtol=16 * unit, atol=16 * unit)


@pytest.mark.parametrize(("dtype", "narrow"), CASTS, ids=str)
def test_a_sum_is_the_exact_one_rounded_once(dtype: torch.dtype, narrow: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 50, WIDTH, dtype=dtype)
    cell = Through(lambda x, h: x.to(narrow).sum(-1, keepdim=True)).to(dtype)
    with torch.no_grad(), fc.runner("compiled"):
        y, _ = fc.scan(cell, x)
    total = x[0].to(narrow).double().sum(-1, keepdim=True).to(dtype).to(narrow).to(dtype)
    assert torch.equal(y[0], total * cell.gain.detach() + 0.5 * x[0])


REFUSED: dict[str, tuple[torch.dtype, Function, str]] = {
    "wider": (torch.float32, lambda x, h: (x.double() * 2).float(), r"make the cell double\(\), or leave the cast out"),
    "product": (
        torch.float64,
        lambda x, h: torch.bmm(x.float()[:, None], h.float()[:, :, None])[:, 0].double(),
        r"cast back, \.to\(torch\.float64\), before bmm",
    ),
    "sum in place": (
        torch.float32,
        lambda x, h: x.to(torch.int8).scatter_add(1, (x > 0).long(), x.to(torch.int8)).float(),
        r"Integers that wrap around are compiled elementwise: use \.long\(\) before scatter_add",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_to_write(name: str) -> None:
    dtype, function, remedy = REFUSED[name]
    with pytest.raises(fc.NotCompilable, match=remedy), fc.runner("compiled"):
        fc.scan(Through(function).to(dtype), torch.randn(2, 3, WIDTH, dtype=dtype))
