"""The check mode detects out-of-bounds accesses and changes no result."""

import ctypes
import os
import signal
import subprocess
import sys

import pytest
import torch

import fusecell as fc
from fusecell.compiler.dispatch.runner import find_trainable
from fusecell.compiler.runtime import guard_pages as check
from fusecell.errors import CompilerError
from tests.compiler.checked_kernel import run_checked


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
    ("word", "shift", "message"),
    [
        ("out.output.ptr", -1, "wrote before output"),
        ("in.x.ptr", -1, "wrote before x"),
        ("last.h.ptr", -64, r"wrote before last\.h"),
        ("at.state.h", -1, r"wrote before its buffer state\.h"),
    ],
)
def test_a_write_outside_an_argument_is_found(word, shift, message):
    with pytest.raises(CompilerError, match=message):
        run_checked(lambda words: ctypes.memset(words[word] + shift, 0, 1))


def test_a_kernel_without_an_address_is_not_run():
    with pytest.raises(CompilerError, match=r"without weight\.weight_hh\.ptr"):
        run_checked(lambda words: pytest.fail("it ran"), missing_slot="weight.weight_hh.ptr")


@pytest.mark.skipif(sys.platform == "win32", reason="no guard pages")
@pytest.mark.parametrize(
    ("word", "behind"),
    [("out.output.ptr", 7 * 3 * 17 * 4), ("in.x.ptr", 7 * 3 * 5 * 4), ("weight.weight_hh.ptr", 3 * 17 * 17 * 4)],
)
def test_a_read_past_an_argument_ends_the_process(word, behind):
    """Reading the last byte is fine; reading the next one ends the process."""
    code = f"""if True:
        import ctypes, sys
        from tests.compiler.checked_kernel import run_checked
        def run(words):
            ctypes.string_at(words["{word}"] + {behind} - 1, 1)
            print("so far", flush=True)
            ctypes.string_at(words["{word}"] + {behind}, 1)
            print("too far", flush=True)
        run_checked(run)
    """
    process = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (-signal.SIGSEGV, "so far\n")


def test_a_write_between_two_buffers_is_found(checking, monkeypatch):
    cell, x = fc.LSTMCell(5, 17), torch.randn(7, 3, 5)
    trainable = find_trainable(cell, (x,))
    training = trainable.training((False, True, True, True, True), recompute=False)
    whole = training.forward.kernel.emitted
    name, size = next((n, s) for n, s in whole.buffers.items() if n.startswith("panel.loop"))
    # As if the panel were a block shorter than what is written.
    shorter = type(size)(size.fixed - 64, size.per_row, size.per_chunk_row, size.per_chunk_step)
    monkeypatch.setitem(whole.buffers, name, shorter)
    with pytest.raises(CompilerError, match=f"wrote behind its buffer {name},"):
        fc.scan(cell, x)


def test_the_check_mode_is_set_by_the_environment():
    code = """if True:
        import torch, fusecell as fc
        from fusecell.compiler.runtime import guard_pages as check
        y, _ = fc.GRU(5, 10)(torch.randn(7, 3, 5))
        y.sum().backward()
        print(check.ENABLED)
    """
    off = "from fusecell.compiler.runtime import guard_pages as check; print(check.ENABLED)"
    for value, script, expected in (("1", code, "True"), ("0", off, "False"), ("", off, "False")):
        environment = {**os.environ, "FUSECELL_CHECK": value}
        process = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        assert process.stdout.strip() == expected
