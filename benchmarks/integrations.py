"""How much faster training steps of other libraries run with fusecell's layers: ``python -m benchmarks.integrations``.

Each pair is measured in turns in one process, by its processor time; the packages are in
tests/integrations/requirements.txt.
"""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fusecell as fc

Step = Callable[[], object]


def accelerated(on: bool) -> Any:
    return fc.accelerate() if on else contextlib.nullcontext()


def recurrent_ppo(on: bool) -> Step:
    """sb3-contrib's RecurrentPPO with its MlpLstmPolicy on CartPole: rollouts of 128 steps, and their epochs."""
    import gymnasium
    from sb3_contrib import RecurrentPPO

    with accelerated(on):
        model = RecurrentPPO("MlpLstmPolicy", gymnasium.make("CartPole-v1"), n_steps=128, seed=0, device="cpu")
    return lambda: model.learn(128, reset_num_timesteps=False)


def torchrl_gru(on: bool) -> Step:
    """A training step of torchrl's GRUModule in recurrent mode: 64 rows of 50 steps, 32 features, 64 units."""
    from tensordict import TensorDict
    from torchrl.modules import GRUModule, set_recurrent_mode

    with accelerated(on):
        module = GRUModule(32, 64, in_key="x", out_key="y")
    starts = torch.rand(64, 50, 1) < 0.02
    data = TensorDict({"x": torch.randn(64, 50, 32), "is_init": starts}, [64, 50])

    def step() -> None:
        module.zero_grad()
        with set_recurrent_mode(True):
            module(data.clone())["y"].square().mean().backward()

    return step


def forecasting_lstm(on: bool) -> Step:
    """A training step of pytorch-forecasting's LSTM: 128 rows of 60 steps, 16 features, 32 units, two layers."""
    from pytorch_forecasting.models.nn import get_rnn

    model = nn.Sequential(get_rnn("LSTM")(16, 32, num_layers=2, batch_first=True))
    if on:
        fc.replace(model)
    x = torch.randn(128, 60, 16)

    def step() -> None:
        model.zero_grad()
        model[0](x)[0].square().mean().backward()

    return step


CLIENTS = {
    "sb3-contrib RecurrentPPO": (recurrent_ppo, "sb3_contrib", 5),
    "torchrl GRUModule": (torchrl_gru, "torchrl", 21),
    "pytorch-forecasting LSTM": (forecasting_lstm, "pytorch_forecasting", 21),
}


def gain(make: Callable[[bool], Step], turns: int) -> float:
    """Return how many times as long a step takes with torch.nn's layers: the median of the turns."""
    pair, ratios = (make(False), make(True)), []
    for _ in range(turns):
        seconds = []
        for step in pair:
            began = time.process_time()
            step()
            seconds.append(time.process_time() - began)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[1:])


def main() -> None:
    torch.set_num_threads(1)
    for name, (make, package, turns) in CLIENTS.items():
        if importlib.util.find_spec(package) is None:
            print(f"{name:30} {package} is not installed")
            continue
        torch.manual_seed(0)
        print(f"{name:30} {gain(make, turns):.2f} times as fast", flush=True)


if __name__ == "__main__":
    main()
