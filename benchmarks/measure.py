"""One shape: every contestant's outputs compared with the answer, then all timed by turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.clock import Timing, take_turns
from benchmarks.peers import OURS, Call, Peer
from benchmarks.problem import Array, Problem, make_problem
from benchmarks.shapes import Shape
from fusecell.errors import NotCompilable

__all__ = ["Row", "measure"]

# Float32 against float64 over a hundred steps; a wrong gate is wrong by a thousand times this.
_TOLERANCE = 5e-5


@dataclass(frozen=True)
class Row:
    """What was found for a shape.

    Attributes:
        shape: which.
        timings: by contestant's name.
        errors: the largest absolute differences from float64, by contestant's name.
        refused: why ours was not compiled and is missing from ``timings``; empty if it was.
        core_share: processor time over wall time while timing; on one core, well below 1 says that others used it.
    """

    shape: Shape
    timings: dict[str, Timing]
    errors: dict[str, float]
    refused: str = ""
    core_share: float = 1.0

    def microseconds(self, name: str) -> float | None:
        """Of one time step; None if ``name`` did not run."""
        return self.timings[name].median / self.shape.steps * 1e6 if name in self.timings else None

    def best_peer(self) -> str | None:
        """The fastest contestant but ours."""
        others = [name for name in self.timings if name != OURS.name]
        return min(others, key=lambda name: self.timings[name].median, default=None)

    def ratio(self) -> float | None:
        """How many times faster than the best peer ours is; below 1 it is slower."""
        ours, best = self.microseconds(OURS.name), self.best_peer()
        other = self.microseconds(best) if best else None
        return other / ours if ours and other else None


def measure(shape: Shape, peers: Sequence[Peer], threads: int, seconds: float) -> Row:
    """Build, compare and time ours and ``peers`` on ``shape``.

    Raises:
        ArithmeticError: a contestant's outputs are not the answer's.
    """
    problem = make_problem(shape)
    calls: dict[str, Call] = {}
    errors: dict[str, float] = {}
    refused = ""
    for peer in (OURS, *peers):
        call = peer.build(problem, threads)
        if call is None:
            continue
        try:
            found = peer.outputs(call())
        except NotCompilable as reason:
            refused = str(reason)
            continue
        errors[peer.name] = _error(peer.name, problem, found)
        calls[peer.name] = call
    # The pools of some peers spin for milliseconds after a call, on cores that the next one needs.
    pause = 0.01 if threads > 1 else 0.0
    wall, processor = time.perf_counter(), time.process_time()
    timings = take_turns(calls, seconds / len(calls), pause)
    share = (time.process_time() - processor) / (time.perf_counter() - wall)
    return Row(shape, timings, errors, refused, share)


def _error(name: str, problem: Problem, found: Array) -> float:
    if found.shape != problem.answer.shape:
        raise ArithmeticError(
            f"{name} on {problem.shape.name}: outputs of {found.shape}, expected {problem.answer.shape}."
        )
    error = float(np.abs(found - problem.answer).max())
    bound = _TOLERANCE * max(1.0, float(np.abs(problem.answer).max()))
    if not error <= bound:  # NaN too
        raise ArithmeticError(f"{name} on {problem.shape.name}: off by {error:.2g}, expected at most {bound:.2g}.")
    return error
