"""What a process waits for before its first result: the import, and the first call with a cold and a warm cache."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

import pytest

RUNS = 3
# Others may be using the machine.
PATIENCE = 3

_PROGRAM = """
import json, sys, time
import torch
began = time.perf_counter()
import fusecell as fc
gru, x = fc.GRU(5, 10), torch.randn(10, 3, 5)
imported = time.perf_counter()
with torch.no_grad(), fc.runner("compiled"):
    began_call = time.perf_counter()
    gru(x)
    called = time.perf_counter()
heavy = [name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules]
print(json.dumps({"import": imported - began, "call": called - began_call, "heavy": heavy}))
"""


def measure(cache) -> dict:
    """One process: the seconds it took, and what it imported of the heavy modules."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"FUSECELL_CACHE": str(cache), "OMP_NUM_THREADS": "1", "FUSECELL_CHECK": "0"}
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, list[dict]]:
    directories = [tmp_path_factory.mktemp("cache", numbered=True) for _ in range(RUNS)]
    for directory in directories:
        directory.chmod(0o700)
    measure(directories[0] / "first")  # leaves the package's bytecode behind
    cold = [measure(directory) for directory in directories]
    return {"cold": cold, "warm": [measure(directory) for directory in directories]}


def median(found: list[dict], what: str) -> float:
    return statistics.median(run[what] for run in found)


def test_nothing_heavy_is_imported(runs):
    assert [run["heavy"] for run in runs["cold"] + runs["warm"]] == [[]] * (2 * RUNS)


def test_import(runs):
    assert median(runs["warm"], "import") < PATIENCE * 0.150


def test_first_call_with_an_empty_cache(runs):
    assert median(runs["cold"], "call") < PATIENCE * 0.400


def test_first_call_with_a_warm_cache(runs):
    assert median(runs["warm"], "call") < PATIENCE * 0.030
    assert median(runs["warm"], "call") < median(runs["cold"], "call")
