"""Train speechbrain's LSTM and Li-GRU with fusecell: one line after the model is made.

speechbrain's Li-GRU is a Python loop over time; ``fc.replace`` runs the loop as a scan, with its batch norm before it.

    pip install fusecell speechbrain
    python examples/recipes/speechbrain_ligru.py
"""

from __future__ import annotations

import torch
from side_by_side import Step, compare
from torch import nn

import fusecell as fc


class Recognizer(nn.Module):
    """An LSTM, a bidirectional Li-GRU, and the log-probabilities of sounds."""

    def __init__(self, rows: int, features: int, units: int, sounds: int) -> None:
        super().__init__()
        from speechbrain.nnet.RNN import LSTM, LiGRU

        self.lstm = LSTM(units, input_size=features)
        self.ligru = LiGRU(units, (rows, None, units), num_layers=2, bidirectional=True, dropout=0.15)
        self.head = nn.Linear(2 * units, sounds)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.lstm(x)
        y, _ = self.ligru(y)
        return self.head(y).log_softmax(-1)


def program(fusecell: bool, small: bool) -> Step:
    """Label every frame of 16 utterances of 100 frames."""
    rows, frames, features, units = (3, 11, 5, 7) if small else (16, 100, 40, 128)
    model = Recognizer(rows, features, units, features)
    if fusecell:
        fc.replace(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x = torch.randn(rows, frames, features)
    label = x.roll(1, 1).argmax(-1)  # the loudest band of the frame before

    def step() -> float:
        loss = nn.functional.nll_loss(model(x).flatten(0, 1), label.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


if __name__ == "__main__":
    compare(program)
