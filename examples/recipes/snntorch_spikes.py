"""Train a network of snntorch's spiking neurons with fusecell: its loop over time becomes a scan of the same network.

pip install fusecell snntorch
python examples/recipes/snntorch_spikes.py
"""

from __future__ import annotations

import torch
from side_by_side import Step, compare
from torch import nn

import fusecell as fc


def program(fusecell: bool, small: bool) -> Step:
    """Tell two rhythms of spikes apart, with a hidden layer of leaky neurons."""
    import snntorch
    from snntorch import surrogate, utils

    rows, steps, features, units = (3, 11, 5, 7) if small else (64, 50, 64, 128)
    neuron = {
        "beta": 0.9,
        "learn_beta": True,
        "threshold": 0.3,
        "init_hidden": True,
        "spike_grad": surrogate.fast_sigmoid(),
    }
    network = nn.Sequential(
        nn.Linear(features, units), snntorch.Leaky(**neuron), nn.Linear(units, 2), snntorch.Leaky(**neuron)
    )
    if fusecell:  # the membrane potentials, which each neuron keeps, are the state of the cell
        layer = fc.Recurrent(fc.wrap(network, input_size=features, states=("1.mem", "3.mem")))

    def spikes(x: torch.Tensor) -> torch.Tensor:
        if fusecell:
            outputs: torch.Tensor = layer(x)[0]
            return outputs
        utils.reset(network)
        return torch.stack([network(frame) for frame in x])

    optimizer = torch.optim.Adam(network.parameters(), lr=2e-2)
    label = torch.arange(rows) % 2
    rate = 0.3 + 0.3 * torch.sin(torch.arange(steps)[:, None] * (0.5 + 0.5 * label))
    x = torch.bernoulli(rate[..., None].expand(steps, rows, features))

    def step() -> float:
        loss = nn.functional.cross_entropy(spikes(x).sum(0), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


if __name__ == "__main__":
    compare(program)
