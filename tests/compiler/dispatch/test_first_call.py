"""Counts of a process's work before its first result: imports, compilations, Python calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

_PROGRAM = """
import json, sys
import torch
before = set(sys.modules)
import fusecell as fc
gru, x = fc.GRU(5, 10), torch.randn(10, 3, 5)
imported = set(sys.modules)
from fusecell.compiler.backend import llvm
compiled, object_code = [], llvm.object_code
llvm.object_code = lambda text, *rest: (compiled.append(text), object_code(text, *rest))[1]
events = []
with torch.no_grad(), fc.runner("compiled"):
    sys.setprofile(lambda frame, event, value: events.append(event))
    gru(x)
    sys.setprofile(None)
print(json.dumps({
    "imported": sorted(imported - before),
    "imported by the call": sorted(set(sys.modules) - imported),
    "heavy": sorted({"torch._dynamo", "torch._inductor", "sympy"} & set(sys.modules)),
    "compiled": len(compiled),
    "calls": events.count("call") + events.count("c_call"),
}))
"""


def measure(cache) -> dict:
    """Run one process and return its counts."""
    environment = os.environ | {"FUSECELL_CACHE": str(cache), "OMP_NUM_THREADS": "1", "FUSECELL_CHECK": "0"}
    process = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, env=environment, check=True
    )
    return json.loads(process.stdout)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict]:
    cache = tmp_path_factory.mktemp("cache")
    cache.chmod(0o700)
    return {name: measure(cache) for name in ("cold", "warm")}


def test_nothing_heavy_is_imported(runs):
    assert [run["heavy"] for run in runs.values()] == [[], []]


def test_the_import_brings_in_little_beside_the_library(runs):
    """Only declared dependencies are imported, and of fusecell only what a layer needs."""
    for run in runs.values():
        assert {name.partition(".")[0] for name in run["imported"]} - sys.stdlib_module_names <= {
            "fusecell",
            "llvmlite",
            "numpy",
        }
        submodules = [name for name in run["imported"] if name.startswith("fusecell")]
        for unused in ("cli", "convert", "demo", "inspection", "play", "streaming", "tape", "testing"):
            assert f"fusecell.{unused}" not in submodules
        # A module more takes a third of a millisecond: one that comes from elsewhere with dozens is to be seen here.
        assert len(run["imported"]) - len(submodules) < 50
        assert len(submodules) < 260


def test_the_first_call_imports_nothing(runs):
    assert [run["imported by the call"] for run in runs.values()] == [[], []]


def test_the_first_call_compiles_once_and_with_a_warm_cache_never(runs):
    assert [run["compiled"] for run in runs.values()] == [1, 0]


def test_the_first_call_runs_a_bounded_amount_of_python(runs):
    """Tracing, planning and writing the text take about 85,000 calls of functions for a GRU, 105,000 with the larger
    tiles of AVX-512: the contract of graphs, names of values, and the module that is compared with itself included."""
    assert 0 < runs["warm"]["calls"] < runs["cold"]["calls"] < 120_000
