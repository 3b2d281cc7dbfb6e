"""Parts of a call on several threads: the numbers of the Python loop, and the same bits on any number of them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

import fusecell as fc
from fusecell.compiler import program, threads, training


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Calls of any size go in parts."""
    for module in (program, training):
        monkeypatch.setattr(module, "LONG_CALL", 0)
    monkeypatch.setattr(training, "TRAINING_ROWS", 2)
    monkeypatch.setattr(training, "FEW_STEPS", 1)
    monkeypatch.setattr(training, "MOST_PARTS", 3)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["torch's team", "Python's threads"])
def team(request, monkeypatch):
    if request.param == "Python's threads":
        monkeypatch.setattr(threads, "_parallel", lambda: None)
    elif threads._parallel() is None:
        pytest.skip("torch has no OpenMP runtime with GNU's entry here")


def run(cell, x, options, runner="compiled"):
    """Outputs and states without gradient, then with it, and all gradients."""
    with fc.runner(runner):
        with torch.no_grad():
            y, after = fc.scan(cell, x, **options)
            found = [y, *(after if isinstance(after, tuple) else (after,))]
        cell.zero_grad()
        leaf = x.clone().requires_grad_()
        y, after = fc.scan(cell, leaf, **options)
        results = [y, *(after if isinstance(after, tuple) else (after,))]
        sum((value * torch.arange(1.0, 1 + value.shape[-1])).sum() for value in results).backward()
    return [*found, *(value.detach() for value in results), leaf.grad, *(p.grad.clone() for p in cell.parameters())]


OPTIONS = {
    "plain": {},
    "lengths": {"lengths": [5, 9, 0, 1, 9, 4, 9]},
    "resets, reversed": {
        "resets": torch.rand(9, 7, generator=torch.Generator().manual_seed(0)) < 0.3,
        "reverse": True,
    },
    "all at once": {
        "lengths": torch.tensor([5, 9, 0, 1, 9, 4, 9]),
        "resets": torch.rand(9, 7, generator=torch.Generator().manual_seed(1)) < 0.3,
        "reverse": True,
    },
}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("make", [fc.GRUCell, fc.LSTMCell, fc.cells.LayerNormGRUCell])
@pytest.mark.usefixtures("team")
def test_parts_are_the_whole(make, kind):
    torch.manual_seed(2)
    cell = make(5, 11).double()
    x = torch.randn(9, 7, 5, dtype=torch.float64)
    seen = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        seen.append(run(cell, x, OPTIONS[kind]))
    for one, two, three in zip(*seen, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    for mine, loop in zip(seen[0], run(cell, x, OPTIONS[kind], "eager"), strict=True):
        torch.testing.assert_close(mine, loop, rtol=1e-11, atol=1e-11)


def test_layouts_of_parts():
    torch.manual_seed(3)
    layer = fc.GRU(5, 11, batch_first=True, bidirectional=True)
    torch.set_num_threads(2)
    x = torch.randn(9, 7, 5).transpose(0, 1)
    with torch.no_grad():
        y, _ = layer(x)
        assert torch.equal(y, layer(x.contiguous())[0])
        assert torch.equal(y[3:4], layer(x[3:4])[0])


@pytest.mark.usefixtures("team")
def test_many_callers_at_once():
    torch.manual_seed(4)
    cells = [fc.GRUCell(5, 11) for _ in range(4)]
    x = torch.randn(30, 9, 5)
    expected = [run(cell, x, {}) for cell in cells]
    wrong = []

    def work(cell, numbers):
        torch.set_num_threads(2)
        for _ in range(5):
            if not all(torch.equal(a, b) for a, b in zip(run(cell, x, {}), numbers, strict=True)):
                wrong.append(cell)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(cells, expected, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_after_a_fork():
    """A child has none of its parent's threads."""
    script = """
import os, sys, torch, fusecell as fc
torch.set_num_threads(2)
layer, x = fc.GRU(64, 128), torch.randn(50, 32, 64)
with torch.no_grad():
    expected = layer(x)[0][-1, -1].tolist()
child = os.fork()
if child == 0:
    with torch.no_grad():  # torch's own operators on large tensors wait for ever for their parent's threads
        os._exit(0 if layer(x)[0][-1, -1].tolist() == expected else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
