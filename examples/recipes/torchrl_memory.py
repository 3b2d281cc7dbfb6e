"""Train torchrl's LSTMModule and GRUModule with fusecell: one line after the modules are made.

A row of a replay buffer holds episodes one after the other. torchrl cuts it where an episode begins, pads the pieces to
one length, packs them, and puts the outputs together again; ``fc.replace`` makes it one call with ``resets=``.

    pip install fusecell torchrl
    python examples/recipes/torchrl_memory.py
"""

from __future__ import annotations

import torch
from side_by_side import Step, compare
from torch import nn

import fusecell as fc


def program(fusecell: bool, small: bool) -> Step:
    """Learn a value of the past from rows of several episodes, with an LSTM and a GRU after it."""
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule, TensorDictSequential
    from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode

    rows, steps, features, units = (4, 12, 5, 7) if small else (64, 50, 32, 64)
    model = TensorDictSequential(
        LSTMModule(features, units, in_key="observation", out_key="memory"),
        GRUModule(units, units, in_keys=["memory", "state", "is_init"], out_keys=["later", ("next", "state")]),
        TensorDictModule(nn.Linear(units, 1), ["later"], ["value"]),
    )
    if fusecell:
        fc.replace(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    observation = torch.randn(rows, steps, features)
    target = observation[..., :1].cumsum(1) / steps
    begins = torch.rand(rows, steps, 1) < 0.05
    data = TensorDict({"observation": observation, "is_init": begins}, [rows, steps])

    def step() -> float:
        with set_recurrent_mode(True):
            value = model(data.clone())["value"]
        loss = (value - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


if __name__ == "__main__":
    compare(program)
