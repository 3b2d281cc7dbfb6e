"""Train pytorch-forecasting's DeepAR with fusecell: one line after the model is made.

pip install fusecell pytorch-forecasting
python examples/recipes/forecasting_deepar.py
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from side_by_side import Step, compare

import fusecell as fc


def series(rows: int, steps: int) -> Any:
    """Return a table of noisy waves, each with its own period and height."""
    import pandas as pd

    random = np.random.default_rng(0)
    time = np.arange(steps)
    tables = []
    for row in range(rows):
        wave = random.uniform(1, 3) * np.sin(2 * np.pi * time / random.uniform(8, 30)) + random.normal(0, 0.1, steps)
        tables.append(pd.DataFrame({"series": str(row), "time": time, "value": wave}))
    return pd.concat(tables, ignore_index=True)


def program(fusecell: bool, small: bool) -> Step:
    """Two layers of LSTM read 60 values and predict the distribution of the next 20; a step is a batch of 128."""
    from pytorch_forecasting import DeepAR, TimeSeriesDataSet

    rows, past, future, units, batch = (4, 8, 3, 6, 5) if small else (16, 60, 20, 32, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning's, about hyperparameters that are modules
        data = TimeSeriesDataSet(
            series(rows, past + future + 2 * batch // rows), time_idx="time", target="value", group_ids=["series"],
            max_encoder_length=past, max_prediction_length=future, time_varying_unknown_reals=["value"],
        )  # fmt: skip
        model = DeepAR.from_dataset(data, hidden_size=units, rnn_layers=2, dropout=0.0)
    if fusecell:
        fc.replace(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x, y = next(iter(data.to_dataloader(train=False, batch_size=batch)))

    def step() -> float:
        loss = model.loss(model(x)["prediction"], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


if __name__ == "__main__":
    compare(program)
