"""Time functions in turns, so that other load on the machine affects all alike."""

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
# Seconds of sleep before a turn of several threads, and of such a turn. After their work threads spin for a while, some
# for tens of milliseconds, on cores that the next contestant's threads need.
_PAUSE, _TURN_OF_THREADS = 0.05, 0.02


@dataclass(frozen=True)
class Timing:
    """Seconds of one call of a function.

    Attributes:
        median, best: of the mean times of the turns.
        turns: the number of turns.
        calls: the number of calls in each turn.
    """

    median: float
    best: float
    turns: int
    calls: int


def take_turns(
    contestants: Mapping[str, Callable[[], object]], seconds: float, *, threads: int = 1
) -> dict[str, Timing]:
    """Time the contestants in rounds of a turn each; at least five rounds.

    Arguments:
        contestants: functions by name; they must have been called once, so that nothing compiles here.
        seconds: the average time for each contestant.
        threads: the number of threads of each. With several, a pause before each turn lets the threads of the one
            before fall asleep, and calls that are not timed wake up its own.

    Returns:
        The :class:`Timing` of each contestant by name.
    """
    several = threads > 1
    turn = _TURN_OF_THREADS if several else _TURN_SECONDS
    calls = {name: _calls_per_turn(call, turn) for name, call in contestants.items()}
    turns: dict[str, list[float]] = {name: [] for name in contestants}
    began, rounds = time.perf_counter(), 0
    # A collection of garbage would be counted as the time of whichever contestant triggers it.
    collecting = gc.isenabled()
    gc.disable()
    try:
        while rounds < _LEAST_ROUNDS or time.perf_counter() - began < seconds * len(contestants):
            for name, call in contestants.items():
                time.sleep(_PAUSE if several else 0)
                # Not timed: these calls bring the weights back into the cache and wake up the threads.
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
    """Choose the calls of a turn so that it takes about ``turn`` seconds."""
    # The least of three: a single call may be the one that another process interrupts.
    once = min(_mean_seconds(call, 1) for _ in range(3))
    return max(1, min(_MOST_CALLS, round(turn / once)))
