"""Forecast next year's sunspots from histories of different lengths.

The data are the yearly sunspot numbers since 1700 that statsmodels ships (from the Royal Observatory of Belgium's
SILSO, public domain). A row is a history of 5 to 60 years; ``lengths`` says how long each is, in any order, and
padding costs nothing. The model reads a history and predicts the next year. It is trained on the years before 1900 and
compared on those from 1900 on with two baselines: the last year again, and the year one cycle of 11 years ago.

    pip install 'fusecell[examples]'
    python examples/forecasting.py
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor, nn

import fusecell as fc

SHORTEST, LONGEST, SPLIT = 5, 60, 1900


def sunspots() -> tuple[np.ndarray, np.ndarray]:
    """Load the years, and the mean sunspot number of each."""
    from statsmodels.datasets import sunspots as data

    table = data.load_pandas().data
    return table["YEAR"].to_numpy(int), table["SUNACTIVITY"].to_numpy(np.float32)


class Forecaster(nn.Module):
    """A GRU that reads a history, with a readout that predicts the change to the next year."""

    def __init__(self, hidden: int = 24) -> None:
        super().__init__()
        self.reader = fc.GRU(1, hidden)
        fc.init.chrono_(self.reader, 2 * 11)  # memories of up to two solar cycles
        self.head = nn.Linear(hidden, 1)

    def forward(self, history: Tensor, lengths: Tensor) -> Tensor:
        """Predict the next year (N,) of histories (T, N) with lengths (N,)."""
        # h_n is the state after each row's last valid year, wherever its padding begins.
        _, h_n = self.reader(history[..., None], lengths=lengths)
        last = history[lengths - 1, torch.arange(len(lengths))]
        out: Tensor = self.head(h_n[0])[:, 0]
        return last + out


def batch(values: Tensor, ends: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw histories of random lengths that end before the years with indices ``ends``.

    Returns:
        The histories (LONGEST, N), padded at their ends with whatever follows; their lengths; the next years, (N,).
    """
    longest = ends.clamp(max=LONGEST)
    lengths = SHORTEST + (torch.rand(len(ends), generator=random) * (longest - SHORTEST + 1)).long()
    years = (ends - lengths) + torch.arange(LONGEST)[:, None]
    history = values[years.clamp(max=len(values) - 1)]
    return history, lengths, values[ends]


def train(epochs: int, *, seed: int = 0, quiet: bool = False) -> dict[str, float]:
    """Train; return the mean absolute errors of the model and the baselines on the years from 1900 on."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    years, numbers = sunspots()
    scale = float(numbers[years < SPLIT].std())
    values = torch.from_numpy(numbers) / scale
    early = torch.from_numpy(np.flatnonzero((years < SPLIT) & (np.arange(len(years)) >= SHORTEST)))
    late = torch.from_numpy(np.flatnonzero(years >= SPLIT))
    model = Forecaster()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        history, lengths, after = batch(values, early, random)
        optimizer.zero_grad()
        loss = nn.functional.smooth_l1_loss(model(history, lengths), after)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if not quiet and epoch % 100 == 99:
            print(f"epoch {epoch + 1:4}  loss {loss.item():.4f}")
    with torch.no_grad():
        full = torch.full_like(late, LONGEST)
        history = values[(late - LONGEST) + torch.arange(LONGEST)[:, None]]
        forecast = model(history, full)
    truth = values[late]
    guesses = {"fusecell GRU": forecast, "the last year again": values[late - 1], "11 years ago": values[late - 11]}
    return {name: scale * (guess - truth).abs().mean().item() for name, guess in guesses.items()}


def main() -> None:
    """Train and print the errors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"mean absolute error, sunspots per year, {SPLIT} to 2008")
    for name, error in train(options.epochs, seed=options.seed).items():
        print(f"  {error:6.1f}  {name}")


if __name__ == "__main__":
    main()
