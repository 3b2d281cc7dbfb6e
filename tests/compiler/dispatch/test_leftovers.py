"""Steps that leave tensors on their module: compiled where no step reads them, and left as a loop leaves them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fusecell as fc


class Neuron(nn.Module):
    """Spiking neuron that keeps what it has computed, as those of spiking libraries do: potential, reset, rate."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mem", torch.zeros(0), persistent=False)
        self.weight = nn.Parameter(torch.eye(5) * 0.7)
        self.records: dict[str, Tensor] = {}

    def forward(self, x: Tensor, mem: Tensor) -> tuple[Tensor, Tensor]:
        self.records = {}
        self.mem = mem @ self.weight + x
        spike = (self.mem > 0.3).float()
        self.reset = spike.detach()
        self.rate = spike.mean()
        self.mem = self.mem - self.reset * 0.3
        return spike, self.mem


class Spiking(fc.Cell):
    """A neuron in a cell; its output is float32 in a cell of any dtype."""

    def __init__(self) -> None:
        super().__init__(5, 5)
        self.neuron = Neuron()

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
        spike, mem = self.neuron(x, state[0])
        return spike, (mem,)


CALLS = {
    "plain": {},
    "reverse": {"reverse": True},
    "lengths": {"lengths": torch.tensor([6, 2, 5])},
    "resets": {"resets": torch.arange(18).reshape(6, 3) % 5 == 0},
}


@pytest.mark.parametrize("call", CALLS)
def test_results_and_leftovers_are_those_of_the_loop(call: str) -> None:
    torch.manual_seed(0)
    cell, results = Spiking().double(), []
    for runner in ("eager", "compiled"):
        x = torch.linspace(-1, 1, 90, dtype=torch.float64).reshape(6, 3, 5).sin().requires_grad_()
        with fc.runner(runner):
            y, state = fc.scan(cell, x, **CALLS[call])
        loss = state[0].square().sum() + cell.neuron.mem.sum()
        gradients = torch.autograd.grad(loss, [x, cell.neuron.weight])
        results.append((y, *state, *gradients, cell.neuron.mem, cell.neuron.reset, cell.neuron.rate))
        assert y.dtype == torch.float32
    for actual, expected in zip(*results[::-1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_pieces_and_rows_alone_have_the_bits_of_the_whole(gradients: bool) -> None:
    """The last step of each call is run in Python for what it leaves; what the call returns is the kernel's."""
    torch.manual_seed(0)
    cell, x = Pushed(), torch.randn(6, 3, 13)
    with fc.runner("compiled"), torch.set_grad_enabled(gradients):
        whole, last = fc.scan(cell, x)
        first, state = fc.scan(cell, x[:2])
        second, state = fc.scan(cell, x[2:3], state)
        third, state = fc.scan(cell, x[3:], state)
        row, row_state = fc.scan(cell, x[:, 1:2])
        assert torch.equal(torch.cat([first, second, third]), whole)
        assert torch.equal(state, last)
        assert torch.equal(row, whole[:, 1:2])
        assert torch.equal(row_state, last[1:2])


class Pushed(fc.Cell):
    """A cell with a product over more features than the order of their sum could be a matter of luck for."""

    def __init__(self) -> None:
        super().__init__(13, 17)
        self.both = nn.Linear(13 + 17, 17)

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
        self.pushed = torch.tanh(self.both(torch.cat([x, state[0]], -1)))
        return self.pushed * 2, (self.pushed,)


def test_what_a_step_that_draws_returns_and_leaves_are_of_the_same_numbers() -> None:
    cell = Drawing(5, 5)
    results = []
    for runner in ("eager", "compiled"):
        torch.manual_seed(0)
        with fc.runner(runner):
            y, h = fc.scan(cell, torch.ones(4, 3, 5))
        results.append((y, h, cell.noisy, torch.rand(3)))
    for actual, expected in zip(*results[::-1], strict=True):
        assert torch.equal(actual, expected)
    assert torch.equal(results[1][2], results[1][1])


class Drawing(fc.Cell):
    """A cell that draws noise, and keeps what it has made of it."""

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
        self.noisy = x * 0.5 + state[0] + torch.randn_like(state[0])
        return self.noisy, (self.noisy,)


def test_other_batch_sizes_are_not_compiled_anew() -> None:
    cell = Spiking()
    with fc.runner("compiled"), torch.no_grad():
        for rows in (3, 2, 3, 7):
            fc.scan(cell, torch.ones(4, rows, 5))
            assert cell.neuron.mem.shape == (rows, 5)
    from fusecell.compiler.dispatch.program_cache import PROGRAMS

    assert sum("Neuron" in str(key) for key in PROGRAMS._programs if Spiking in key[0]) == 1


def test_one_step_and_a_stream() -> None:
    cell = Spiking()
    x = torch.linspace(-1, 1, 5)
    with torch.no_grad():
        y, _ = fc.scan(cell, x[None, None])
        stream = fc.Stream(cell)
        assert torch.equal(torch.as_tensor(stream.step(x.numpy())), y[0, 0])


class Reading(fc.Cell):
    """A cell that reads what its last step has left."""

    last = None

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
        before = x if self.last is None else self.last
        self.last = x
        return before, state


def test_a_step_that_reads_what_another_has_left_is_refused() -> None:
    with pytest.raises(fc.NotCompilable, match=r"adds self\.last in test_leftovers\.py"), fc.runner("compiled"):
        fc.scan(Reading(5, 5), torch.ones(4, 3, 5))


class Counting(fc.Cell):
    """A cell that keeps account of its steps: their number, or a running mean, in which no result takes part."""

    def __init__(self, kind: str) -> None:
        super().__init__(5, 5)
        self.kind = kind
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(5))

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
        h = torch.tanh(x + state[0])
        if self.kind == "count":
            self.count = self.count + 1
        else:
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return h, (h,)


@pytest.mark.parametrize("kind", ["count", "mean"])
def test_an_account_that_a_step_keeps_is_of_all_steps(kind: str) -> None:
    with pytest.raises(fc.NotCompilable, match=rf"sets self\.{kind}"), fc.runner("compiled"):
        fc.scan(Counting(kind), torch.ones(6, 3, 5))
    cells = [Counting(kind), Counting(kind)]
    with fc.runner("eager"):
        fc.scan(cells[0], torch.ones(6, 3, 5))
    with pytest.warns(fc.EagerWarning):
        fc.scan(cells[1], torch.ones(6, 3, 5))
    assert torch.equal(cells[1].count, cells[0].count)
    assert torch.equal(cells[1].mean, cells[0].mean)


class Remembering(fc.Cell):
    """A cell with a tensor of three rows on the module, in the place of a state."""

    def __init__(self) -> None:
        super().__init__(5, 5)
        self.before = torch.zeros(3, 5)

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
        self.before = torch.tanh(x + self.before)
        return self.before, state


def test_a_batch_kept_on_the_module_is_refused_with_the_remedy() -> None:
    with (
        pytest.raises(fc.NotCompilable, match=r"was tried with: it takes any.* belongs into the state"),
        fc.runner("compiled"),
    ):
        fc.scan(Remembering(), torch.ones(4, 3, 5))
