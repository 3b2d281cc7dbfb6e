"""The memory of a training step, counted block by block, against torch.nn's."""

from __future__ import annotations

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fusecell as fc
from tests.compiler.tuned import tuned

STEPS, ROWS, HIDDEN = 120, 32, 256


def peak_bytes(call):
    """Return the peak of the bytes that torch allocates in a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = highest = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


def test_a_training_step_takes_no_more_than_torchs(monkeypatch):
    # All blocks are torch's, which tells what it allocates: the large ones are NumPy's otherwise.
    tuned(monkeypatch, huge_scratch_bytes=1 << 62, huge_result_bytes=1 << 62)
    torch.manual_seed(0)
    x, peaks = torch.randn(STEPS, ROWS, 64), {}
    for name, home in (("ours", fc), ("torch.nn", nn)):
        layer = home.GRU(64, HIDDEN)

        def step(x, layer=layer):
            layer(x)[0].square().mean().backward()

        step(x[:3])
        peaks[name] = peak_bytes(lambda step=step: step(x))
    # The outputs at least, their squares, and four gates that a backward needs.
    assert min(peaks.values()) > 6 * 4 * STEPS * ROWS * HIDDEN
    assert peaks["ours"] <= peaks["torch.nn"], peaks
