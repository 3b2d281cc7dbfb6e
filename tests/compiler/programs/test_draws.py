"""Random numbers that a step draws: a compiled call draws those of the Python loop, forward and backward."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributions, nn

import fusecell as fc

DRAWS = {
    "dropout": lambda z, cell: cell.drop(z),
    "alpha_dropout": lambda z, cell: F.alpha_dropout(z, 0.3, True),
    "randn_like": lambda z, cell: z + 0.1 * torch.randn_like(z),
    "one for all rows": lambda z, cell: z * torch.rand(z.shape[1], dtype=z.dtype),
    "one per row": lambda z, cell: z + torch.rand(z.shape[0], 1, dtype=z.dtype),
    "batch in the middle": lambda z, cell: z + torch.randn(2, *z.shape, dtype=z.dtype).sum(0),
    "in place": lambda z, cell: z + torch.empty_like(z).normal_(0, 0.2),
    "a mask": lambda z, cell: z * torch.empty_like(z, dtype=torch.bool).bernoulli_(0.4),
    "unused": lambda z, cell: (z, torch.randn_like(z))[0],
    "bernoulli of values": lambda z, cell: z * torch.bernoulli(z.sigmoid()),
    "bernoulli in place": lambda z, cell: z + torch.empty_like(z).bernoulli_(z.sigmoid()),
    "normal of values": lambda z, cell: z + torch.normal(z, 0.1) - torch.normal(0.5, z.sigmoid()),
    "normal of numbers": lambda z, cell: z + torch.normal(0.0, 0.2, size=z.shape, dtype=z.dtype),
    "integers": lambda z, cell: z + torch.randint(0, 3, z.shape).to(z.dtype) * torch.randint_like(z, 1, 4),
    "reparametrised": lambda z, cell: distributions.Normal(z, 0.1 + z.sigmoid()).rsample(),
    "gumbel_softmax": lambda z, cell: z * F.gumbel_softmax(z, dim=-1),
    "one-hot": lambda z, cell: (
        z * distributions.OneHotCategoricalStraightThrough(logits=z.reshape(-1, 2, 3)).rsample().flatten(1)
    ),
    "categorical": lambda z, cell: z + distributions.Categorical(logits=z).sample()[:, None],
}
CALLS = {
    "plain": {},
    "reverse": {"reverse": True},
    "lengths": {"lengths": torch.tensor([7, 3, 5])},
    "resets": {"resets": torch.rand(7, 3, generator=torch.Generator().manual_seed(1)) < 0.3},
}


class Drawing(fc.Cell):
    """A plain RNN whose state is changed by something random."""

    def __init__(self, name: str) -> None:
        super().__init__(5, 6)
        self.linear = nn.Linear(11, 6)
        self.drop = nn.Dropout(0.3)
        self.name = name

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
        (h,) = state
        h = DRAWS[self.name](torch.tanh(self.linear(torch.cat((x, h), -1))), self)
        return h, (h,)


def results(cell: fc.Cell, runner: str, call: dict, dtype: torch.dtype) -> list[Tensor]:
    """The output, what it is without gradients, the gradients, and the state of the generator after each."""
    x = torch.linspace(-1, 1, 105).reshape(7, 3, 5).to(dtype).requires_grad_()
    with fc.runner(runner):
        torch.manual_seed(3)
        with torch.no_grad():
            inference = fc.scan(cell, x, **call)[0]
        states = [torch.get_rng_state()]
        torch.manual_seed(3)
        output = fc.scan(cell, x, **call)[0]
        states.append(torch.get_rng_state())
        gradients = torch.autograd.grad(output.sin().sum(), [x, *cell.parameters()])
    return [inference, output, *gradients, *states]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", DRAWS)
def test_the_numbers_are_those_of_the_loop(name: str, call: str) -> None:
    torch.manual_seed(0)
    cell = Drawing(name).double()
    loop = results(cell, "eager", CALLS[call], torch.float64)
    for actual, expected in zip(results(cell, "compiled", CALLS[call], torch.float64), loop, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_other_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for name in ("dropout", "randn_like", "bernoulli of values"):
        cell = Drawing(name).to(dtype)
        loop, compiled = (results(cell, runner, {}, dtype) for runner in ("eager", "compiled"))
        assert torch.equal(loop[-1], compiled[-1])
        # Another sample, or one in another place, would be apart by tenths.
        torch.testing.assert_close(compiled[:2], loop[:2], rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-2)


def test_gradients_of_gradients_are_of_the_same_draws() -> None:
    torch.manual_seed(0)
    cell = Drawing("randn_like").double()
    second = []
    for runner in ("eager", "compiled"):
        x = torch.linspace(-1, 1, 105).double().reshape(7, 3, 5).requires_grad_()
        with fc.runner(runner):
            torch.manual_seed(3)
            output = fc.scan(cell, x)[0]
            torch.manual_seed(8)
            (first,) = torch.autograd.grad(output.sin().sum(), [x], create_graph=True)
            second.append((*torch.autograd.grad(first.square().sum(), [cell.linear.weight]), torch.rand(2)))
    torch.testing.assert_close(second[1], second[0], rtol=1e-10, atol=1e-10)


def test_two_calls_draw_two_samples() -> None:
    cell = Drawing("dropout")
    x = torch.ones(7, 3, 5)
    with fc.runner("compiled"), torch.no_grad():
        first, second = (fc.scan(cell, x)[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_in_eval_nothing_is_drawn() -> None:
    cell = Drawing("dropout").eval()
    before = torch.get_rng_state()
    with fc.runner("compiled"), torch.no_grad():
        fc.scan(cell, torch.ones(7, 3, 5))
    assert torch.equal(before, torch.get_rng_state())


def _own_generator(z: Tensor, cell: nn.Module) -> Tensor:
    return z + torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=z.dtype)


@pytest.mark.parametrize(
    ("draw", "reason"),
    [
        (_own_generator, "draws from a generator of its own"),
        (lambda z, cell: z + torch.randperm(6), r"by randperm.* Sort uniform numbers"),
        (lambda z, cell: z + torch.multinomial(z.sigmoid(), 3, True).sum(-1, True), "by multinomial"),
        (lambda z, cell: z + torch.randn(z.shape[0], z.shape[0]).sum(), "several dimensions as long as the batch"),
    ],
)
def test_what_cannot_be_drawn_before_the_loop_is_refused(draw, reason: str, monkeypatch) -> None:
    monkeypatch.setitem(DRAWS, reason, draw)
    with pytest.raises(fc.NotCompilable, match=reason), fc.runner("compiled"):
        fc.scan(Drawing(reason), torch.zeros(4, 3, 5))


def test_a_stream_says_where_to_draw() -> None:
    with pytest.raises(fc.NotCompilable, match=r"Cell\.draw"):
        fc.Stream(Drawing("dropout"))


class DrawingLikeInput(fc.Cell):
    """A cell that adds noise to its input."""

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
        h = torch.tanh(x + torch.randn_like(x) + state[0])
        return h, (h,)


def test_a_tensor_in_another_order_in_memory_is_drawn_for_in_the_loops_order() -> None:
    cell, outputs = DrawingLikeInput(5, 5), []
    x = torch.ones(5, 3, 7).permute(2, 1, 0)  # a step's (3, 5) lies column by column
    with pytest.raises(fc.NotCompilable, match=r"\.contiguous\(\)"), fc.runner("compiled"):
        fc.scan(cell, x)
    for runner in ("eager", "auto"):
        torch.manual_seed(4)
        with fc.runner(runner), warnings.catch_warnings():
            warnings.simplefilter("ignore", fc.EagerWarning)
            outputs.append(fc.scan(cell, x)[0])
    assert torch.equal(*outputs)


class DrawingLikeState(fc.Cell):
    """A cell whose state lies column by column in memory after a step, in which order torch draws numbers like it."""

    def __init__(self) -> None:
        super().__init__(5, 5)
        self.mix = nn.Parameter(torch.eye(5))
        self.is_in_order = False

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
        h = torch.tanh((self.mix @ (x + torch.randn_like(state[0])).t()).t())
        return h, (h.contiguous() if self.is_in_order else h,)


def test_a_state_in_another_order_in_memory_is_drawn_for_in_the_loops_order() -> None:
    cell, x = DrawingLikeState(), torch.ones(7, 3, 5)
    order = r"the state h with its dimensions .* h\.contiguous\(\)"
    with pytest.raises(fc.NotCompilable, match=order), fc.runner("compiled"):
        fc.scan(cell, x)
    cell.is_in_order = True
    outputs = []
    for runner in ("compiled", "eager"):
        torch.manual_seed(4)
        with fc.runner(runner):
            outputs.append(fc.scan(cell, x)[0])
    torch.testing.assert_close(*outputs)


def test_a_call_that_runs_eagerly_draws_once() -> None:
    """The generator is where one run of the loop leaves it, though the compiler refuses after it has begun."""
    cell, states = Drawing("dropout").requires_grad_(True), []
    x = torch.ones(5, 3, 7).permute(2, 1, 0)
    for runner in ("eager", "auto"):
        torch.manual_seed(4)
        with fc.runner(runner), warnings.catch_warnings():
            warnings.simplefilter("ignore", fc.EagerWarning)
            fc.scan(cell, x)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


class DroppingLayers(fc.Cell):
    """torch.nn's layers with dropout between them; they take states with the batch second."""

    states = ("h", "c")

    def __init__(self) -> None:
        super().__init__(5, 6)
        self.state_sizes = ((2, 6), (2, 6))
        self.lstm = nn.LSTM(5, 6, num_layers=2, dropout=0.3)

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, (h, c) = self.lstm(x[None], tuple(value.transpose(0, 1).contiguous() for value in state))
        return y[0], (h.transpose(0, 1), c.transpose(0, 1))


def test_states_may_be_returned_in_another_order_where_no_draw_is_like_them() -> None:
    torch.manual_seed(0)
    cell = DroppingLayers().double()
    loop = results(cell, "eager", {}, torch.float64)
    for actual, expected in zip(results(cell, "compiled", {}, torch.float64), loop, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_refusal_of_draws_like_a_state_in_another_order() -> None:
    class Turned(fc.Cell):
        def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
            h = torch.tanh(state[0] + torch.randn_like(state[0]) + x)
            return h, (h.t().contiguous().t(),)

    with pytest.raises(fc.NotCompilable, match=r"return h.contiguous\(\)"), fc.runner("compiled"):
        fc.scan(Turned(5, 5), torch.randn(4, 3, 5))
