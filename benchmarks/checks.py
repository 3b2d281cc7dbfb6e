"""Measure what is promised of time and resident memory; fail if a limit is exceeded: ``python -m benchmarks.checks``.

It is not part of ``make test``, because it fails on a busy machine; the tests count calls, compilations and allocations
instead.
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
    """A measured figure and its limit."""

    name: str
    value: float
    limit: float
    unit: str

    @property
    def passed(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "TOO MUCH"
        return f"{self.name:<66} {self.value:10.3g} {self.unit:<4} of {self.limit:8.3g}   {verdict}"


def _process(script: str, *arguments: str, **environment: str) -> object:
    """Run a script in a new process and return what it prints, parsed as JSON."""
    # One thread and no guard pages: both change time and memory.
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "FUSECELL_CHECK": "", **environment}
    process = subprocess.run([sys.executable, "-c", script, *arguments], env=settings, capture_output=True, check=True)
    return json.loads(process.stdout)


def first_call() -> Iterator[Check]:
    """Check the seconds of the import, torch's excluded, and of the first call with a cold and a warm disk cache."""
    runs: dict[str, list[list[float]]] = {"cold": [], "warm": []}
    # Three fresh caches: the first process of each compiles, the second reads what it stored.
    for _ in range(3):
        with tempfile.TemporaryDirectory() as cache:
            for each in runs.values():
                seconds = _process(_FIRST_CALL, FUSECELL_CACHE=cache)
                assert isinstance(seconds, list)
                each.append(seconds)
    median = {
        name: [1e3 * statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in runs.items()
    }
    yield Check("import of fusecell and a first layer, without torch's", median["warm"][0], 150, "ms")
    yield Check("first call of a GRU, nothing in the cache", median["cold"][1], 400, "ms")
    yield Check("first call of a GRU, from the cache", median["warm"][1], 40, "ms")


def long_sequence() -> Iterator[Check]:
    """Check the time of 200 steps compiled, relative to the Python loop."""
    import fusecell as fc
    from fusecell.inspection.benchmark import measure

    seconds = measure(fc.GRU(16, 32), 200, 4, seconds=1.0).seconds
    ratio = seconds["fusecell"] / seconds["Python loop"]
    yield Check("a GRU over 200 steps, relative to the Python loop", ratio, 0.2, "")


def memory() -> Iterator[Check]:
    """Check resident memory: the peak of a training step relative to torch.nn, and the growth over a stream's steps."""
    peak, torch_peak = (_process(_PEAK, name) for name in ("fusecell", "torch.nn"))
    assert isinstance(peak, float)
    assert isinstance(torch_peak, float)
    yield Check("peak of a training step, GRU T500 N64 I64 H256, relative to torch", peak / torch_peak, 1.0, "")
    growth = _process(_STREAM)
    assert isinstance(growth, float)
    yield Check("growth over 200,000 steps of a stream", growth, 256, "KiB")


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (first_call, long_sequence, memory)


def main() -> None:
    """Print each figure as soon as it is measured; exit with 1 if one exceeds its limit."""
    failed = 0
    for group in CHECKS:
        for check in group():
            print(check, flush=True)
            failed += not check.passed
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
