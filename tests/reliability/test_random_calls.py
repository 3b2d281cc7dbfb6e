"""Calls of every form, compiled against the Python loop; and the same bits on any number of threads."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

import fusecell as fc
from tests.compiler.cpu_levels import runs_here
from tests.reliability.random_calls import calls, check


@seed(1)
@settings(
    max_examples=100,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(calls())
def test_any_call(call):
    check(call)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_same_bits_on_any_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.manual_seed(3)
    layer, x = fc.LSTM(37, 61), torch.randn(83, 29, 37)
    runs = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            layer.zero_grad()
            y, _ = layer(x)
            y.square().sum().backward()
            runs.append([y, *(parameter.grad.clone() for parameter in layer.parameters())])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


SCRIPT = """
import hashlib, torch, fusecell as fc
torch.manual_seed(3)
digest = hashlib.sha256()
for layer in (fc.LSTM(37, 61, bidirectional=True), fc.Recurrent(fc.cells.LayerNormGRUCell(37, 33))):
    x = torch.randn(83, 29, 37, requires_grad=True)
    with fc.runner("compiled"):
        y, _ = layer(x, lengths=torch.randint(0, 84, (29,)), resets=torch.rand(83, 29) < 0.05)
    y.square().sum().backward()
    for value in (y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())):
        digest.update(value.numpy().tobytes())
print(digest.hexdigest())
"""


def digest(**environment):
    """Return a digest of outputs and gradients, computed in a new process."""
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return process.stdout


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the levels are x86-64's")
def test_the_same_bits_in_any_process_and_on_every_level():
    """Bits don't depend on threads, cache or vector width; levels without FMA have other bits, also fixed."""
    threads = [digest(FUSECELL_TARGET="native", OMP_NUM_THREADS=str(count)) for count in (1, 4)]
    wide = [level for level in ("x86-64-v3", "x86-64-v4") if runs_here(level)]
    levels = [digest(FUSECELL_TARGET=level, FUSECELL_CACHE="off", OMP_NUM_THREADS="2") for level in wide]
    assert len(set(threads + levels)) == 1
    without = [digest(FUSECELL_TARGET="x86-64-v2", OMP_NUM_THREADS=str(count)) for count in (1, 4)]
    assert len(set(without)) == 1
    assert without[0] != threads[0]
