"""The check mode finds what it is there to find, and changes no result."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch

import fusecell as fc
from fusecell.compiler import check
from fusecell.compiler.runner import find_learner, find_program
from fusecell.errors import CompilerError


@pytest.fixture
def checking(monkeypatch):
    monkeypatch.setattr(check, "ENABLED", True)


def results(cell, x, **options):
    x = x.clone().requires_grad_()
    outputs, state = fc.scan(cell, x, **options)
    (outputs.sin().sum() + sum(value.sum() for value in torch.atleast_1d(state))).backward()
    return [outputs.detach(), x.grad, *(parameter.grad for parameter in cell.parameters())]


@pytest.mark.parametrize("batch_first", [False, True])
def test_results_are_the_same_bits(monkeypatch, batch_first):
    cell, x = fc.GRUCell(5, 17), torch.randn(7, 3, 5)
    if batch_first:
        x = x.transpose(0, 1).contiguous()
    options = {"lengths": [7, 0, 4], "batch_first": batch_first}
    plain = results(cell, x, **options)
    cell.zero_grad()
    monkeypatch.setattr(check, "ENABLED", True)
    assert all(torch.equal(one, other) for one, other in zip(plain, results(cell, x, **options), strict=True))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda words, size: words["out.output.ptr"] + size, "wrote behind output"),
        (lambda words, size: words["out.output.ptr"] - 1, "wrote before output"),
        (lambda words, size: words["last.h.ptr"] - 64, r"wrote before last\.h"),
        (lambda words, size: words["scratch"] - 1, "wrote before the scratch memory"),
    ],
)
def test_a_write_outside_is_found(write, message):
    cell, x = fc.GRUCell(5, 17), torch.randn(7, 3, 5)
    found = find_program(cell, (x,)).kernel
    block = found.block()
    outputs, last = torch.empty(7, 3, 17), torch.empty(3, 17)
    kept = [
        found.give_sequences(block, found.words.inputs.values(), [x]),
        found.give_matrices(block, found.words.weights.values(), [p.detach() for p in cell.parameters()]),
        found.give_states(block, found.words.first, [torch.zeros(3, 17)]),
    ]
    found.give_sequences(block, found.words.outputs.values(), [outputs])
    found.give_states(block, found.words.last, [last])

    def run(address):
        found.long(address)
        words = (ctypes.c_int64 * len(found.emitted.words)).from_address(address)
        ctypes.memset(write(dict(zip(found.emitted.words, words, strict=True)), outputs.nbytes), 0, 1)

    sizes = found.words.sizes
    block[sizes[0]], block[sizes[1]], block[sizes[3]] = 7, 3, 7
    extents = found.words.extents(7, 3, 4)
    with pytest.raises(CompilerError, match=message):
        check.checked_run(run, block, found.emitted, extents, found.words.positions, steps=7, rows=3, chunk=7)
    del kept


def test_a_write_between_two_buffers_is_found(checking, monkeypatch):
    cell, x = fc.LSTMCell(5, 17), torch.randn(7, 3, 5)
    learner = find_learner(cell, (x,))
    training = learner.training((False, True, True, True, True), recompute=False)
    whole = training.forward.kernel.emitted
    name, size = next((n, s) for n, s in whole.buffers.items() if n.startswith("panel"))
    # As if the panel were a block shorter than what is written.
    shorter = type(size)(size.fixed - 64, size.per_row, size.per_chunk_row, size.per_chunk_step)
    monkeypatch.setitem(whole.buffers, name, shorter)
    with pytest.raises(CompilerError, match=f"wrote behind its buffer {name}"):
        fc.scan(cell, x)


def test_the_environment_switches_it_on():
    code = """if True:
        import torch, fusecell as fc
        from fusecell.compiler import check
        y, _ = fc.GRU(5, 10)(torch.randn(7, 3, 5))
        y.sum().backward()
        print(check.ENABLED)
    """
    for value, expected in (("1", "True"), ("0", "False"), ("", "False")):
        environment = {**os.environ, "FUSECELL_CHECK": value}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected
