"""The recurrent state-space model of PlaNet and Dreamer: a GRU, and a stochastic state with prior and posterior."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusecell.cell import Cell
from fusecell.execution.options import State

__all__ = ["RSSMCell"]


class RSSMCell(Cell):
    r"""The recurrent state-space model, with Gaussian states.

    .. math::
        h' &= \mathrm{GRU}(W [z, a], h) \\
        \mu_p, \sigma_p &= \mathrm{prior}(h'), \quad \mu_q, \sigma_q = \mathrm{posterior}(h', e) \\
        z' &= \mu_q + \sigma_q \epsilon, \quad \epsilon \sim N(0, 1)

    Example:
        >>> import torch, fusecell as fc
        >>> cell = fc.cells.RSSMCell(action_size=2, embedding_size=6, hidden_size=8, stochastic_size=3)
        >>> y, (h, z) = fc.Recurrent(cell)((torch.randn(7, 4, 2), torch.randn(7, 4, 6)))
        >>> y["state"].shape, y["prior_mean"].shape
        (torch.Size([7, 4, 11]), torch.Size([7, 4, 3]))

    Arguments:
        action_size, embedding_size: features of the action, and of what was observed: the inputs.
        hidden_size, stochastic_size: features of h and of z.
        minimum: of both standard deviations.

    Returns:
        A dict: ``state``, h and z side by side, and means and deviations of prior and posterior.

    Paper: Hafner et al., "Learning latent dynamics for planning from pixels", 2018, arXiv:1811.04551.
    """

    inputs = ("action", "embedding", "noise")
    states = ("h", "z")

    def __init__(
        self,
        action_size: int,
        embedding_size: int,
        hidden_size: int,
        stochastic_size: int,
        *,
        minimum: float = 0.1,
    ) -> None:
        super().__init__(action_size, hidden_size)
        self.state_sizes = (hidden_size, stochastic_size)
        statistics = ("prior_mean", "prior_deviation", "mean", "deviation")
        self.output_size = {"state": hidden_size + stochastic_size, **dict.fromkeys(statistics, stochastic_size)}
        self.minimum, self.stochastic_size = minimum, stochastic_size
        self.input = nn.Linear(stochastic_size + action_size, hidden_size)
        self.gru = nn.GRUCell(hidden_size, hidden_size)
        self.prior = nn.Linear(hidden_size, 2 * stochastic_size)
        self.posterior = nn.Linear(hidden_size + embedding_size, 2 * stochastic_size)

    def draw(
        self,
        steps: int,
        batch_size: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> State:
        return (torch.randn(steps, batch_size, self.stochastic_size, dtype=dtype, device=device),)

    def step(self, x: tuple[Tensor, ...], state: State) -> tuple[dict[str, Tensor], State]:
        action, embedding, noise = x
        h, z = state
        h = self.gru(F.elu(self.input(torch.cat((z, action), -1))), h)
        prior_mean, prior_raw = self.prior(h).chunk(2, -1)
        mean, raw = self.posterior(torch.cat((h, embedding), -1)).chunk(2, -1)
        prior_deviation, deviation = (F.softplus(value) + self.minimum for value in (prior_raw, raw))
        z = mean + deviation * noise
        outputs = {
            "state": torch.cat((h, z), -1),
            "prior_mean": prior_mean,
            "prior_deviation": prior_deviation,
            "mean": mean,
            "deviation": deviation,
        }
        return outputs, (h, z)
