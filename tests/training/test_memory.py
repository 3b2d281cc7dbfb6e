"""The memory of a training step, against torch.nn's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_STEP = """
import importlib, sys, torch
module = importlib.import_module(sys.argv[1])
torch.set_num_threads(1)
layer = module.GRU(64, 256)
def step(steps, rows):
    layer(torch.randn(steps, rows, 64))[0].square().mean().backward()
step(3, 2)
def kib(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = kib("VmRSS")
step(500, 64)
print(kib("VmHWM") - before)
"""


def peak(module):
    """KiB that a step at T500 B64 I64 H256 takes at most, in a process that has taken a tiny one."""
    command = [sys.executable, "-c", _STEP, module]
    plain = {**os.environ, "FUSECELL_CHECK": ""}  # the check mode copies all that a kernel may touch
    return int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=200, env=plain).stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are measured as Linux tells them")
def test_a_training_step_takes_no_more_than_torchs():
    mine, theirs = peak("fusecell"), peak("torch.nn")
    assert theirs > 100_000
    assert mine <= theirs, f"{mine:,} KiB, torch.nn {theirs:,} KiB"
