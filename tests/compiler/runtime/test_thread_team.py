"""Calls of several threads: the numbers of the Python loop, and the same bits on any number of them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import fusecell as fc
from fusecell.compiler.runtime import thread_team as threads
from tests.compiler import force_threads
from tests.compiler.tuned import tuned


class ManyLayers(fc.Cell):
    """Residual blocks, of which there are so many that buffers are placed in a loop."""

    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size)
        self.gru = nn.GRUCell(input_size, hidden_size)
        self.maps = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(9))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_size) for _ in range(9))

    def step(self, x, state):
        y = h = self.gru(x, state[0])
        for each, norm in zip(self.maps, self.norms, strict=True):
            y = y + torch.tanh(each(norm(y)))
        return y, (h,)


@pytest.fixture(autouse=True)
def team_for_every_call(monkeypatch):
    """Calls of any size have a thread team, which waits for all of its threads."""
    force_threads.always(monkeypatch)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["torch's team", "Python's threads"])
def team(request, monkeypatch):
    if request.param == "Python's threads":
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    elif threads._openmp() is None:
        pytest.skip("torch has no OpenMP runtime with GNU's entry here")


def run(cell, x, options, runner="compiled"):
    """Outputs and states without gradient, then with it, and all gradients."""
    with fc.runner(runner):
        with torch.no_grad():
            y, after = fc.scan(cell, x, **options)
            plain = [y, *(after if isinstance(after, tuple) else (after,))]
        cell.zero_grad()
        leaf = x.clone().requires_grad_()
        y, after = fc.scan(cell, leaf, **options)
        results = [y, *(after if isinstance(after, tuple) else (after,))]
        sum((value * torch.arange(1.0, 1 + value.shape[-1])).sum() for value in results).backward()
    return [*plain, *(value.detach() for value in results), leaf.grad, *(p.grad.clone() for p in cell.parameters())]


def options(kind, rows):
    arguments, generator = {}, torch.Generator().manual_seed(len(kind))
    if "lengths" in kind:
        arguments["lengths"] = torch.randint(0, 10, (rows,), generator=generator).index_fill(0, torch.tensor([1]), 9)
    if "resets" in kind:
        arguments["resets"] = torch.rand(9, rows, generator=generator) < 0.3
    return {**arguments, "reverse": "reversed" in kind}


@pytest.mark.parametrize("kind", ["plain", "lengths", "resets, reversed", "lengths, resets, reversed"])
@pytest.mark.parametrize("make", [fc.GRUCell, fc.LSTMCell, fc.cells.LayerNormGRUCell])
@pytest.mark.usefixtures("team")
def test_any_number_of_threads_gives_the_same_bits(make, kind, monkeypatch):
    """Seven rows are too few to split among two threads, thirteen among four; chunks have a few steps."""
    tuned(monkeypatch, chunk_bytes=16 << 10)
    torch.manual_seed(2)
    cell = make(5, 37).double()
    same_bits_on_any_number_of_threads(cell, kind)


def test_many_buffers(monkeypatch):
    tuned(monkeypatch, chunk_bytes=16 << 10)
    cell = ManyLayers(5, 37).double()
    assert "buffer.sizes" in fc.explain(cell).cells[0].backward.llvm
    same_bits_on_any_number_of_threads(cell, "lengths, resets, reversed")


def same_bits_on_any_number_of_threads(cell, kind):
    for rows in (7, 13):
        x, arguments = torch.randn(9, rows, 5, dtype=torch.float64), options(kind, rows)
        seen = []
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            seen.append(run(cell, x, arguments))
        for one, *others in zip(*seen, strict=True):
            assert all(torch.equal(one, other) for other in others)
        for actual, loop in zip(seen[0], run(cell, x, arguments, "eager"), strict=True):
            torch.testing.assert_close(actual, loop, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("rows", [15, 16, 61])
@pytest.mark.parametrize("make", [fc.GRUCell, fc.LSTMCell])
def test_weight_gradients_split_by_rows(make, rows, reverse, monkeypatch):
    """From 16 rows on, each half of the rows is summed separately, in several row blocks and a rest."""
    torch.manual_seed(5)
    cell, x = make(5, 19), torch.randn(83, rows, 5)
    torch.set_num_threads(1)
    first = run(cell, x, {"reverse": reverse})
    for count, chunk in ((2, 0), (3, 0), (4, 0), (1, 30_000), (2, 1)):
        torch.set_num_threads(count)
        tuned(monkeypatch, chunk_bytes=chunk or 1 << 30)
        fc.refresh()
        again = run(cell, x, {"reverse": reverse})
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True)), (count, chunk)
    exact = run(cell.double(), x.double(), {"reverse": reverse}, "eager")
    for actual, loop in zip(first, exact, strict=True):
        assert (actual - loop).abs().max() <= 3e-6 * loop.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lengths", [{}, {"lengths": [11, 0, *range(1, 11), 3, 11, 9, 2, 4]}], ids=["", "lengths"])
def test_weight_gradients_with_packed_operands(lengths, dtype, monkeypatch):
    """Operands of 2 kB and more per row are packed into micro-panels, here of eight features and of seven.

    With lengths the rows of all steps are one run, and no half of them is summed apart.
    """
    torch.manual_seed(6)
    cell, x = fc.GRUCell(19, 261, dtype=dtype), torch.randn(11, 17, 19, dtype=dtype)
    runs = {}
    for count, chunk in ((1, 1 << 30), (2, 1 << 30), (3, 1), (2, 100_000)):
        torch.set_num_threads(count)
        tuned(monkeypatch, chunk_bytes=chunk)
        fc.refresh()
        runs[count, chunk] = run(cell, x, lengths)
    first, *others = runs.values()
    for other in others:
        assert all(torch.equal(one, another) for one, another in zip(first, other, strict=True))
    tolerance = 3e-6 if dtype == torch.float32 else 1e-13
    for actual, loop in zip(first, run(cell.double(), x.double(), lengths, "eager"), strict=True):
        assert (actual - loop).abs().max() <= tolerance * loop.abs().max()


@pytest.mark.parametrize("count", [1, 2])
def test_weight_gradients_of_no_rows(count):
    torch.set_num_threads(count)
    cell, x = fc.GRUCell(5, 261), torch.full((9, 7, 5), torch.nan)
    y, _ = fc.scan(cell, x, lengths=[0] * 7)
    for gradient in torch.autograd.grad(y.sum(), list(cell.parameters())):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_threads_in_different_chunks_do_not_share_buffers():
    """Without barriers in the loop, one thread may be in the last, shorter chunk while another is in the one before."""
    torch.manual_seed(7)
    cell, x = fc.GRUCell(32, 128), torch.randn(32, 64, 32)
    parameters = list(cell.parameters())

    def both():
        with torch.no_grad():
            y = fc.scan(cell, x)[0]
        return [y, *torch.autograd.grad(fc.scan(cell, x)[0].sum(), parameters)]

    torch.set_num_threads(1)
    expected = both()
    torch.set_num_threads(2)
    for _ in range(100):
        assert all(map(torch.equal, both(), expected))


def test_late_threads_are_not_waited_for(monkeypatch):
    """Threads that have arrived do the call; later calls use one thread, for longer each time."""
    tuned(monkeypatch, most_arrival_us=0)
    cell, x = fc.GRUCell(5, 11), torch.randn(9, 7, 5)
    torch.set_num_threads(1)
    expected = run(cell, x, {})
    torch.set_num_threads(4)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(run(cell, x, {}), expected, strict=True))
    aside, stays = threads._Backoff(), []
    aside.judge(0, late=True)
    assert aside.until == 0
    for now in range(12):
        aside.judge(now, late=True)
        stays.append(aside.until - now)
    assert stays == sorted(stays)
    assert 0 < stays[0] < stays[-1] < 1
    aside.judge(12, late=False)
    aside.judge(13, late=True)
    aside.judge(14, late=True)
    assert aside.until - 14 == pytest.approx(stays[0])


def test_layouts_on_two_threads():
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
    subprocess.run([sys.executable, "-c", script], check=True, timeout=600)
