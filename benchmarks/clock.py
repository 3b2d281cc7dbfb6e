"""Timing by turns: what else the machine does meets every contestant alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["Timing", "take_turns"]

_LEAST_ROUNDS = 5
_TURN_SECONDS = 2e-3
_MOST_CALLS = 200
# Threads spin for a while after their work, some for tens of milliseconds, and take the core of those who come next.
_PAUSE, _TURN_OF_THREADS = 0.05, 0.02


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, over the turns.

    Attributes:
        median, best: of the turns' means.
        turns: how many there were.
        calls: in each turn.
    """

    median: float
    best: float
    turns: int
    calls: int


def take_turns(
    contestants: Mapping[str, Callable[[], object]], seconds: float, *, threads: int = 1
) -> dict[str, Timing]:
    """Time every contestant in rounds, until ``seconds`` each, on the average, have passed and five rounds at least.

    Arguments:
        contestants: already called once, so that nothing compiles here.
        seconds: per contestant.
        threads: of each. Those of the one before are given time to fall asleep, one's own to wake up.
    """
    several = threads > 1
    turn = _TURN_OF_THREADS if several else _TURN_SECONDS
    calls = {name: _calls_per_turn(call, turn) for name, call in contestants.items()}
    turns: dict[str, list[float]] = {name: [] for name in contestants}
    began, rounds = time.perf_counter(), 0
    collecting = gc.isenabled()
    gc.disable()
    try:
        while rounds < _LEAST_ROUNDS or time.perf_counter() - began < seconds * len(contestants):
            for name, call in contestants.items():
                time.sleep(_PAUSE if several else 0)
                # Not timed: its weights come back into the cache, its threads wake up.
                for _ in range(1 + calls[name] // 4 if several else 1):
                    call()
                turns[name].append(_mean_seconds(call, calls[name]))
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(statistics.median(t), min(t), rounds, calls[name]) for name, t in turns.items()}


def _mean_seconds(call: Callable[[], object], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls


def _calls_per_turn(call: Callable[[], object], turn: float) -> int:
    once = min(_mean_seconds(call, 1) for _ in range(3))
    return max(1, min(_MOST_CALLS, round(turn / once)))
