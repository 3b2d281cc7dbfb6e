"""A cell as a user might write it, which the compiler was not written with in mind."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fusecell as fc

__all__ = ["FastSlowCell"]


class FastSlowCell(fc.Cell):
    """A cell of a fast and a slow state: the slow one gates the fast one, and follows it at trained rates.

    g = sigmoid(W x + U s + b);  f' = g * softsign(V x + R f + c) + (1 - g) * f * |cos a|;
    s' = s + r * (relu(P f')^2 - s)
    """

    states = ("fast", "slow")

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.of_input = nn.Linear(input_size, 2 * hidden_size)
        self.of_slow = nn.Linear(hidden_size, hidden_size, bias=False)
        self.of_fast = nn.Linear(hidden_size, hidden_size, bias=False)
        self.to_slow = nn.Linear(hidden_size, hidden_size, bias=False)
        self.angle = nn.Parameter(torch.rand(hidden_size))
        self.rate = nn.Parameter(torch.rand(hidden_size))

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute one time step."""
        fast, slow = state
        gate, candidate = self.of_input(x).chunk(2, dim=-1)
        gate = torch.sigmoid(gate + self.of_slow(slow))
        new = nn.functional.softsign(candidate + self.of_fast(fast))
        fast = gate * new + (1 - gate) * fast * torch.cos(self.angle).abs()
        slow = slow + self.rate * (torch.relu(self.to_slow(fast)).square() - slow)
        return fast, (fast, slow)
