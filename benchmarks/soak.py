"""``python -m benchmarks.soak``: random training, inference and streaming for as long as you like.

Every result is compared with the Python loop, and the memory of the process must stay flat.
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
# A handful of sizes, so that memory settles: what was compiled is kept.
_SIZES = ((7, 16), (19, 33))


def _layer(choose: random.Random) -> fc.Recurrent:
    size, hidden = choose.choice(_SIZES)
    cell: fc.Cell = choose.choice(_KINDS)(size, hidden)
    if choose.random() < 0.3:
        cell = choose.choice((lambda cell: fc.Zoneout(cell, 0.2), fc.LearnedState))(cell)
    return fc.Recurrent(cell, reverse=choose.random() < 0.3, recompute=choose.random() < 0.3)


def _turn(choose: random.Random) -> float:
    """One random call, or stream; how far it is from the loop."""
    seed = choose.randrange(10**6)
    torch.manual_seed(seed)
    layer, steps, rows = _layer(choose), choose.randint(1, 40), choose.randint(1, 33)
    x = torch.randn(steps, rows, layer.input_size)
    data: dict[str, torch.Tensor] = {}
    if choose.random() < 0.5:
        data["lengths"] = torch.randint(0, steps + 1, (rows,))
    if choose.random() < 0.5:
        data["resets"] = torch.rand(steps, rows) < 0.1
    if choose.random() < 0.3 and not layer.reverse:
        return _streamed(layer.eval(), x)
    found = []
    for name in ("compiled", "eager"):
        torch.manual_seed(seed)
        layer.zero_grad()
        with fc.runner(name):
            y, _ = layer(x, **data)
        y.square().mean().backward()
        gradients = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
        found.append([y.detach(), *gradients])
    return max(float((mine - theirs).abs().max()) for mine, theirs in zip(*found, strict=True))


def _streamed(layer: fc.Recurrent, x: torch.Tensor) -> float:
    with torch.no_grad():
        expected = layer(x)[0].numpy()
    stream = fc.Stream(layer, x.shape[1])
    return float(np.abs(np.stack([stream.step(step) for step in x.numpy()]) - expected).max())


def _resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def soak(minutes: float, seed: int, *, tolerance: float = 2e-3) -> str:
    """Run for some minutes.

    Raises:
        ArithmeticError: if a result is further from the loop than ``tolerance``.
        MemoryError: if in the second half of the time the process grows by more than 32 MiB, or in a
            run of less than ten minutes, in which kernels are still being compiled, by more than 128 MiB.
    """
    growth = (32 if minutes >= 10 else 128) << 20
    choose, began = random.Random(seed), time.perf_counter()
    turns, worst, settled = 0, 0.0, 0
    while (gone := (time.perf_counter() - began) / 60) < minutes:
        apart = _turn(choose)
        turns, worst = turns + 1, max(worst, apart)
        if not apart <= tolerance:
            raise ArithmeticError(f"turn {turns} of seed {seed} is {apart:.2e} from the loop")
        if not settled and gone > minutes / 2:
            settled = _resident()
    grown = _resident() - settled
    if grown > growth:
        raise MemoryError(f"the process grew by {grown:,} bytes in the second half of {minutes} minutes")
    return f"{turns:,} turns, at most {worst:.1e} from the loop, {grown / 2**20:+.1f} MiB in the second half"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    print(soak(given.minutes, given.seed))


if __name__ == "__main__":
    main()
