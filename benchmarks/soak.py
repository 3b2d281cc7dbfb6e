"""Run random training, inference and streaming for hours: ``python -m benchmarks.soak``.

Every result is compared with the Python loop's, and the memory of the process must not grow.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import fusecell as fc

__all__ = ["main", "soak"]

_KINDS = (fc.GRUCell, fc.LSTMCell, fc.cells.LayerNormGRUCell, fc.cells.LeakyCell)
# Few sizes, so that memory settles: compiled kernels stay in memory.
_SIZES = ((7, 16), (19, 33))


def _layer(choose: random.Random) -> fc.Recurrent:
    size, hidden = choose.choice(_SIZES)
    cell: fc.Cell = choose.choice(_KINDS)(size, hidden)
    if choose.random() < 0.3:
        cell = choose.choice((lambda cell: fc.Zoneout(cell, 0.2), fc.LearnedState))(cell)
    return fc.Recurrent(cell, reverse=choose.random() < 0.3, recompute=choose.random() < 0.3)


def _turn(choose: random.Random) -> float:
    """Make one random call or stream; return its largest difference from the Python loop."""
    seed = choose.randrange(10**6)
    torch.manual_seed(seed)
    layer, steps, rows = _layer(choose), choose.randint(1, 40), choose.randint(1, 33)
    x = torch.randn(steps, rows, layer.input_size)
    data: dict[str, torch.Tensor] = {}
    if choose.random() < 0.5:
        data["lengths"] = torch.randint(0, steps + 1, (rows,))
    if choose.random() < 0.5:
        data["resets"] = torch.rand(steps, rows) < 0.1
    # A stream can't run backwards.
    if choose.random() < 0.3 and not layer.reverse:
        return _streamed(layer.eval(), x)
    results = []
    for name in ("compiled", "eager"):
        torch.manual_seed(seed)
        layer.zero_grad()
        with fc.runner(name):
            y, _ = layer(x, **data)
        y.square().mean().backward()
        gradients = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
        results.append([y.detach(), *gradients])
    return max(float((compiled - eager).abs().max()) for compiled, eager in zip(*results, strict=True))


def _streamed(layer: fc.Recurrent, x: torch.Tensor) -> float:
    """Return the largest difference of a stream's outputs from the layer's."""
    with torch.no_grad():
        expected = layer(x)[0].numpy()
    stream = fc.Stream(layer, x.shape[1])
    return float(np.abs(np.stack([stream.step(step) for step in x.numpy()]) - expected).max())


def _resident() -> int:
    """Return the bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def soak(minutes: float, seed: int, *, tolerance: float = 2e-3) -> str:
    """Run random calls for some minutes and return a summary.

    Arguments:
        minutes: how long.
        seed: of the choices.
        tolerance: the largest difference from the Python loop that is allowed.

    Raises:
        ArithmeticError: if a result differs by more.
        MemoryError: if the process grows by more than 32 MiB in the second half of the time; in a run below ten
            minutes, in which kernels are still being compiled, by more than 128 MiB.
    """
    allowed_growth = (32 if minutes >= 10 else 128) << 20
    # Half of the time to settle: caches fill and kernels get compiled, after that memory must stay flat.
    choose, began = random.Random(seed), time.perf_counter()
    turns, worst, settled = 0, 0.0, 0
    while (elapsed := (time.perf_counter() - began) / 60) < minutes:
        difference = _turn(choose)
        turns, worst = turns + 1, max(worst, difference)
        if not difference <= tolerance:  # NaN too
            raise ArithmeticError(
                f"turn {turns} of seed {seed} differs from the Python loop by {difference:.2e}, expected at most "
                f"{tolerance:g}"
            )
        if not settled and elapsed > minutes / 2:
            settled = _resident()
    growth = _resident() - settled
    if growth > allowed_growth:
        raise MemoryError(f"the process grew by {growth:,} bytes in the second half of {minutes} minutes")
    return f"{turns:,} turns, at most {worst:.1e} from the loop, {growth / 2**20:+.1f} MiB in the second half"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the soak test that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    print(soak(options.minutes, options.seed))


if __name__ == "__main__":
    main()
