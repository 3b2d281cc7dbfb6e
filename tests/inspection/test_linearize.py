"""linearize, against the formula of a plain RNN, finite differences and torch.func."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fusecell as fc
from fusecell import cells


def test_jacobians_of_a_plain_rnn_are_those_of_its_formula() -> None:
    torch.manual_seed(0)
    cell = fc.RNNCell(3, 5).double()
    x, start = torch.randn(7, 2, 3, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    run = fc.linearize(cell, x, start)
    y, _ = fc.scan(cell, x, start)
    torch.testing.assert_close(run.states, y)
    slope = (1 - y.square())[..., None]
    torch.testing.assert_close(run.of_state, slope * cell.weight_hh)
    torch.testing.assert_close(run.of_input, slope * cell.weight_ih)
    assert not run.of_state.requires_grad


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_change_goes_through_the_run_as_the_jacobians_say(reverse: bool, batch_first: bool) -> None:
    torch.manual_seed(1)
    layer = fc.Recurrent(fc.LSTMCell(3, 4), reverse=reverse, batch_first=batch_first).double()
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    own = x.transpose(0, 1) if batch_first else x
    run = fc.linearize(layer, own, chunk_size=5)
    of_start, of_input = torch.randn(2, 8, dtype=torch.float64), torch.randn_like(x)
    change = of_start
    for t in range(5, -1, -1) if reverse else range(6):
        change = (run.of_state[t] @ change[..., None] + run.of_input[t] @ of_input[t][..., None])[..., 0]
    ends = []
    for sign in (1, -1):
        moved = x + sign * 1e-6 * of_input
        state = tuple(sign * 1e-6 * of_start[:, part] for part in run.names.values())
        _, after = layer(moved.transpose(0, 1) if batch_first else moved, state)
        ends.append(torch.cat(after, 1))
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-6, change, rtol=1e-7, atol=1e-8)
    assert run.names == {"h": slice(0, 4), "c": slice(4, 8)}


class Rotating(fc.Cell):
    """A matrix as the state, scaled in each step: all exponents are known."""

    state_sizes = ((2, 2),)

    def __init__(self) -> None:
        super().__init__(1, (2, 2))
        self.scale = torch.tensor([[0.5, 0.5], [2.0, 1.0]], dtype=torch.float64)

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
        m = (state[0] * self.scale).transpose(1, 2) + 0 * x[..., None]
        return m, (m,)


def test_lyapunov_exponents() -> None:
    x = torch.zeros(40, 3, 1, dtype=torch.float64)
    exponents = fc.linearize(Rotating(), x).lyapunov_exponents(skip=20)
    # Off the diagonal two entries change places, and meet 0.5 and 2 in turns.
    expected = torch.tensor([1.0, 1.0, 1.0, 0.5], dtype=torch.float64).log()
    torch.testing.assert_close(exponents, expected.expand(3, 4), rtol=0, atol=1e-12)
    torch.manual_seed(2)
    run = fc.linearize(cells.MGUCell(1, 6).double(), x.sin())
    total = torch.linalg.slogdet(run.of_state).logabsdet.mean(0)
    torch.testing.assert_close(run.lyapunov_exponents().sum(1), total)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fc.linearize(fc.GRU(3, 4), torch.zeros(5, 2, 3)), "takes a cell or a fusecell.Recurrent"),
        (lambda: fc.linearize(fc.GRUCell(3, 4), torch.zeros(5, 3)), r"\(T, N, \.\.\.\).* got \(5, 3\)"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_steps_to_skip() -> None:
    run = fc.linearize(fc.GRUCell(3, 4), torch.zeros(5, 2, 3))
    with pytest.raises(ValueError, match="less than the 5 steps, got 5"):
        run.lyapunov_exponents(skip=5)
