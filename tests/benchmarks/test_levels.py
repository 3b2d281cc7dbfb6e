"""Holding a process to a level of CPUs."""

import subprocess
import sys

import pytest

_HELD = """
import sys
from benchmarks.levels import LEVELS, hold_cpuid

reason = hold_cpuid(sys.argv[1])
if reason is not None:
    print("not held:", reason)
    raise SystemExit
import threading
import llvmlite.binding as llvm

features = []
thread = threading.Thread(target=lambda: features.append(dict(llvm.get_host_cpu_features())))
thread.start()
thread.join()
print(*sorted(name for name, has in features[0].items() if has))
"""


@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3"])
def test_no_library_sees_more_than_the_level_has(level):
    run = subprocess.run([sys.executable, "-c", _HELD, level], capture_output=True, text=True, check=True)
    if run.stdout.startswith("not held:"):
        pytest.skip(run.stdout.strip())
    features = run.stdout.split()
    assert "sse4.2" in features
    assert not [name for name in features if name.startswith(("avx512", "amx", "avx10"))]
    if level == "x86-64-v2":
        assert not {"avx", "avx2", "fma", "f16c", "bmi", "bmi2"} & set(features)
