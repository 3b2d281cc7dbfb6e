"""What steps compute with integers: the numbers of the loop, or the loop itself where a kernel would not have them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fusecell as fc

Function = Callable[[Tensor], Tensor]


class Hashed(fc.Cell):
    """A table is read at a function of ids."""

    def __init__(self, function: Function) -> None:
        super().__init__((), 6)
        self.function = function
        self.table, self.rec = nn.Embedding(64, 6), nn.Linear(6, 6)

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
        h = torch.tanh(self.table(self.function(x)) + self.rec(state[0]))
        return h, (h,)


BITS: dict[str, Function] = {
    "and": lambda i: i & 3,
    "and_of_runs": lambda i: i & 0b101101,
    "and_of_a_negative": lambda i: (i & -5) % 64,
    "or": lambda i: (i | 9) % 64,
    "xor": lambda i: (i ^ 21) & 63,
    "not": lambda i: ~i & 63,
    "of_two": lambda i: ((i & (i * 3 - 7)) | (i ^ (5 - i))) % 64,
    "shifted": lambda i: ((i << 3) % 64 + (i >> 2)) % 64,
    "gcd": lambda i: torch.gcd(i * 7, i * 3 - 21) % 64,
    "gcd_of_a_number": lambda i: torch.gcd(i, torch.tensor(12)) % 64,
    "lcm": lambda i: torch.lcm(i, i - 6) % 64,
    "shifted_by_numbers": lambda i: ((i[:, None] >> torch.arange(6)) & 1).sum(1) + (1 << (i & 3)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BITS)
def test_bits(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    cell, results = Hashed(BITS[name]).to(dtype), []
    x = torch.randint(-40, 40, (7, 5))
    for runner in ("compiled", "eager"):
        with fc.runner(runner):
            y = fc.scan(cell, x)[0]
            results.append((y, *torch.autograd.grad(y.sin().sum(), list(cell.parameters()))))
    torch.testing.assert_close(*results)


HASHES: dict[str, Function] = {
    "product": lambda i: (i * 7919 + 13) % 64,
    "square": lambda i: i * i % 64,
    "power": lambda i: i**3 % 64,
    "lcm": lambda i: torch.lcm(i, i * 5 - 1) % 64,
    "shift": lambda i: (i << 12) // 64 % 64,
    "sum": lambda i: (torch.stack([i, i, i], -1) * 199).cumsum(-1)[:, -1] % 64,
    "sorted": lambda i: torch.stack([i, i], -1).sort(-1)[0][:, 0] * 700 % 64,
    "scaled_sum": lambda i: torch.add(i, i, alpha=700) % 64,
    "narrow": lambda i: (i.to(torch.int32) * 500_000 // 7 % 64).long(),
}


@pytest.mark.parametrize("name", HASHES)
def test_products_of_ids_that_float32_has_not_run_as_the_loop(name: str) -> None:
    torch.manual_seed(0)
    cell = Hashed(HASHES[name])
    small, large = torch.randint(0, 11, (4, 3)), torch.randint(40_000, 60_000, (4, 3))
    with fc.runner("eager"):
        expected = fc.scan(cell, small)[0], fc.scan(cell, large)[0]
    with fc.runner("compiled"):
        torch.testing.assert_close(fc.scan(cell, small)[0], expected[0])
        with pytest.raises(fc.NotCompilable, match=r"An input has integers up to 5\d,\d{3}"):
            fc.scan(cell, large)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fc.EagerWarning)
        torch.testing.assert_close(fc.scan(cell, large)[0], expected[1])


def test_numbers_that_no_input_makes_exact_are_refused() -> None:
    cell, x = Hashed(lambda i: (i + 10**9) % 64), torch.randint(0, 9, (4, 3))
    with pytest.raises(fc.NotCompilable, match=r"computes integers up to 1e\+09.*float32"), fc.runner("compiled"):
        fc.scan(cell, x)
    cell, results = cell.double(), []
    for runner in ("compiled", "eager"):
        with fc.runner(runner):
            results.append(fc.scan(cell, x)[0])
    torch.testing.assert_close(*results)


def test_streams_take_ids_for_which_they_are_exact() -> None:
    cell = Hashed(lambda i: i * 3 % 64)
    x = torch.randint(0, 99, (4, 1))
    stream = fc.Stream(cell)
    for t in range(4):
        y = torch.from_numpy(stream.step(x[t].numpy())).clone()
    torch.testing.assert_close(y, fc.scan(cell, x)[0][-1])
    with pytest.raises(fc.NotCompilable, match=r"Of ids above 2,048 the step computes integers"):
        fc.Stream(Hashed(HASHES["product"]))


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 24), (torch.float64, 53)])
def test_divisors_of_the_largest_integers(dtype: torch.dtype, bits: int) -> None:
    """Fibonacci's and Pell's numbers, of which Euclid's algorithm takes the most steps, and others at the limit."""
    pairs = [(0, 0), (0, 5), (2**bits, 0), (2**bits, 2**bits - 1), (2**bits, 2 ** (bits - 3) * 3), (-12, 18)]
    for factor in (1, 2):
        a, b = 1, 1
        while factor * b + a <= 2**bits:
            a, b = b, factor * b + a
            pairs.append((a, b))
    pairs += [(int(a), int(b)) for a, b in torch.randint(0, 2**bits, (500, 2))]
    rows = torch.tensor(pairs + pairs[: -len(pairs) % 7])

    class Divisor(fc.Cell):
        states = ()

        def __init__(self) -> None:
            super().__init__(2, 1)
            self.gain = nn.Parameter(torch.ones((), dtype=dtype))

        def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
            return torch.gcd(x[:, :1], x[:, 1:]).to(dtype) * self.gain, ()

    with torch.no_grad(), fc.runner("compiled"):
        y = fc.scan(Divisor(), rows[None])[0][0, :, 0]
    assert torch.equal(y.long(), torch.gcd(*rows.unbind(1)))
