"""``python -m benchmarks.checks``: what is promised of time and of resident memory, measured here and judged.

A busy machine fails it, so it is no part of ``make test``, which counts instead: calls, compilations, allocations.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["CHECKS", "Check", "main"]

_FIRST_CALL = """
import json, time, torch
began = time.perf_counter()
import fusecell as fc
gru, x = fc.GRU(5, 10), torch.randn(10, 3, 5)
imported = time.perf_counter()
with torch.no_grad(), fc.runner("compiled"):
    began_call = time.perf_counter()
    gru(x)
print(json.dumps([imported - began, time.perf_counter() - began_call]))
"""

_PEAK = """
import importlib, json, sys, torch
module = importlib.import_module(sys.argv[1])
torch.set_num_threads(1)
layer = module.GRU(64, 256)
def step(steps, rows):
    layer(torch.randn(steps, rows, 64))[0].square().mean().backward()
def kib(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
step(3, 2)
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = kib("VmRSS")
step(500, 64)
print(json.dumps((kib("VmHWM") - before) / 1024))
"""

_STREAM = """
import json, os, numpy as np, fusecell as fc
stream, x, out = fc.Stream(fc.GRU(40, 128)), np.ones(40, np.float32), np.empty(128, np.float32)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
def run(steps):
    for _ in range(steps):
        stream.step(x, out=out)
run(1000)
before = resident()
run(200_000)
print(json.dumps((resident() - before) / 1024))
"""


@dataclass(frozen=True)
class Check:
    """A figure, and the most that it may be."""

    name: str
    found: float
    most: float
    unit: str

    @property
    def passed(self) -> bool:
        return self.found <= self.most

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "TOO MUCH"
        return f"{self.name:<58} {self.found:10.3g} {self.unit:<4} of {self.most:8.3g}   {verdict}"


def _process(script: str, *arguments: str, **environment: str) -> object:
    """What a process of its own prints, in JSON."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "FUSECELL_CHECK": "", **environment}
    done = subprocess.run([sys.executable, "-c", script, *arguments], env=settings, capture_output=True, check=True)
    return json.loads(done.stdout)


def first_call() -> Iterator[Check]:
    """The import beside torch's, and the first call with a cold and a warm cache."""
    runs: dict[str, list[list[float]]] = {"cold": [], "warm": []}
    for _ in range(3):
        with tempfile.TemporaryDirectory() as cache:
            for each in runs.values():
                found = _process(_FIRST_CALL, FUSECELL_CACHE=cache)
                assert isinstance(found, list)
                each.append(found)
    median = {
        name: [1e3 * statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in runs.items()
    }
    yield Check("import of fusecell and a first layer, beside torch", median["warm"][0], 150, "ms")
    yield Check("first call of a GRU, nothing in the cache", median["cold"][1], 400, "ms")
    yield Check("first call of a GRU, from the cache", median["warm"][1], 40, "ms")


def long_sequence() -> Iterator[Check]:
    """200 steps, compiled, in parts of the Python loop's time."""
    import fusecell as fc
    from fusecell.inspection.benchmark import measure

    found = measure(fc.GRU(16, 32), 200, 4, seconds=1.0).seconds
    yield Check("a GRU over 200 steps, in the Python loop's time", found["fusecell"] / found["Python loop"], 0.2, "")


def memory() -> Iterator[Check]:
    """Resident memory: the peak of a training step in torch.nn's, and the growth by steps of a stream."""
    mine, theirs = (_process(_PEAK, name) for name in ("fusecell", "torch.nn"))
    assert isinstance(mine, float)
    assert isinstance(theirs, float)
    yield Check("peak of a training step, GRU T500 N64 I64 H256, in torch's", mine / theirs, 1.0, "")
    grown = _process(_STREAM)
    assert isinstance(grown, float)
    yield Check("growth by 200,000 steps of a stream", grown, 256, "KiB")


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (first_call, long_sequence, memory)


def main() -> None:
    """Print each figure as it is known; exit with 1 if one is too much."""
    failed = 0
    for group in CHECKS:
        for check in group():
            print(check, flush=True)
            failed += not check.passed
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
