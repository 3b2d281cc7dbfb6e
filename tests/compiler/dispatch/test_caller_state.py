"""Process-wide settings around a compiled call: modes, forks, profilers, threads; results equal a plain loop's."""

from __future__ import annotations

import cProfile
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import fusecell as fc
from tests.compiler.fresh_cells import both, fresh_layer, weight_gradient


@pytest.fixture
def layer():
    return fresh_layer()


def test_traced_in_inference_mode_and_trained_afterwards(layer):
    x = torch.randn(6, 3, 5)
    with torch.inference_mode():
        compiled, loop = both(layer, x)
    torch.testing.assert_close(compiled, loop)
    gradient = weight_gradient(layer, x)
    layer.zero_grad()
    with fc.runner("eager"):
        layer(x)[0].square().sum().backward()
    torch.testing.assert_close(gradient, layer.cell.inp.weight.grad)


def test_inference_tensors_as_input_of_training(layer):
    """torch's own layers raise the same."""
    with torch.inference_mode():
        x = torch.randn(6, 3, 5)
    for model in (nn.GRU(5, 9), layer):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            model(x)
    weight_gradient(layer, x.clone())


def test_a_default_device_and_dtype_are_not_the_traces(layer):
    x = torch.randn(6, 3, 5)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.no_grad():
            compiled, loop = both(layer, x)
    finally:
        torch.set_default_dtype(before)
    assert compiled.dtype is torch.float32
    torch.testing.assert_close(compiled, loop)


def test_tracing_draws_nothing(layer):
    before = torch.random.get_rng_state()
    weight_gradient(layer, torch.zeros(6, 3, 5))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_first_call_under_autocast_a_transform_or_a_mode(layer):
    x = torch.randn(6, 3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        compiled, loop = both(layer, x)
    torch.testing.assert_close(compiled, loop)
    with torch.no_grad():
        mapped = torch.func.vmap(lambda row: layer(row)[0], in_dims=1, out_dims=1)(x)
    torch.testing.assert_close(mapped, loop)


def test_first_call_under_a_profiler(layer):
    """Python's own profiler, which can't be put back once it is taken away."""
    x = torch.randn(6, 3, 5)
    profiler = cProfile.Profile()
    with torch.no_grad():
        compiled, loop = profiler.runcall(both, layer, x)
    torch.testing.assert_close(compiled, loop)
    assert any("both" in str(entry.code) for entry in profiler.getstats())


def test_first_call_under_a_profile_function(layer):
    seen = []
    sys.setprofile(lambda frame, event, arg: seen.append(event))
    try:
        with torch.no_grad():
            compiled, loop = both(layer, torch.randn(6, 3, 5))
        assert sys.getprofile() is not None
    finally:
        sys.setprofile(None)
    torch.testing.assert_close(compiled, loop)
    assert seen


def test_a_cell_without_source():
    names = {"fc": fc, "torch": torch}
    exec(
        "class Typed(fc.Cell):\n"
        "    def step(self, x, state):\n"
        "        h = torch.tanh(x + 0.5 * state[0])\n"
        "        return h, (h,)\n",
        names,
    )
    with torch.no_grad():
        compiled, loop = both(fc.Recurrent(names["Typed"](7, 7)), torch.randn(6, 3, 7))
    torch.testing.assert_close(compiled, loop)


def test_many_threads_call_first(layer):
    x = torch.randn(30, 3, 5)
    with torch.no_grad():
        results = [None] * 8
        gate = threading.Barrier(8)

        def call(place):
            gate.wait()
            with torch.no_grad(), fc.runner("compiled"):
                results[place] = layer(x)[0]

        threads = [threading.Thread(target=call, args=(place,)) for place in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        _, loop = both(layer, x)
    assert all(torch.equal(output, results[0]) for output in results)
    torch.testing.assert_close(results[0], loop)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_after_a_fork(tmp_path):
    script = """
import os, sys, torch, fusecell as fc
torch.set_num_threads(1)
torch.manual_seed(0)
layer, x = fc.GRU(5, 9), torch.randn(6, 3, 5)
layer(x)[0].sum().backward()
with torch.no_grad():
    expected = layer(x)[0]
child = os.fork()
if child == 0:
    with torch.no_grad():
        same = torch.equal(layer(x)[0], expected)
        new = fc.Recurrent(fc.LSTMCell(5, 7))(x)[0].isfinite().all()
    os._exit(0 if same and new else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=600)


def test_denormals_are_as_torch_flushes_them(layer):
    """Inside a kernel they are zero, as they are for torch where it is told so."""

    class Scaled(fc.Cell):
        def step(self, x, state):
            (h,) = state
            h = x * 1e-20 + h * 0.5
            return h * 1e30, (h,)

    x = torch.full((4, 2, 3), 1e-19)  # its product with 1e-20 is below float32's normal numbers
    with torch.no_grad():
        try:
            assert torch.set_flush_denormal(True)
            compiled, loop = both(fc.Recurrent(Scaled(3, 3)), x)
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(compiled, loop)
        assert compiled.abs().max() == 0
        # Afterwards torch has them again, though a kernel has run.
        fc.scan(Scaled(3, 3), x)
        assert (torch.tensor(1e-19) * torch.tensor(1e-20)).item() != 0


def test_a_process_ends_quietly_while_a_thread_computes():
    """A daemon thread that is inside a kernel as the interpreter ends.

    It steps a stream, which runs no operation of torch: those abort there by themselves, torch.nn.GRU like any other,
    as torch takes Python's lock back in a destructor and CPython 3.11 ends the thread by unwinding through it.
    """
    script = """
import threading, numpy, fusecell as fc
stream, x = fc.Stream(fc.GRU(256, 256), batch_size=64), numpy.ones((64, 256), numpy.float32)
inside = threading.Event()
def work():
    while True:
        stream.step(x)
        inside.set()
threading.Thread(target=work, daemon=True).start()
inside.wait()
"""
    for _ in range(3):
        process = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, timeout=600)
        assert process.returncode == 0, process.stderr.decode()


class Lazy(fc.Cell):
    """A cell whose first call says how wide its weights are."""

    def __init__(self) -> None:
        super().__init__(5, 6)
        self.inp, self.rec = nn.LazyLinear(6), nn.Linear(6, 6)

    def step(self, x, state):
        h = torch.tanh(self.inp(x) + self.rec(state[0]))
        return h, (h,)


def test_weights_of_the_first_call_are_compiled_with_the_second():
    layer, x = fc.Recurrent(Lazy()), torch.randn(4, 3, 5)
    with pytest.warns(fc.EagerWarning, match=r"inp\.weight is initialized by the first call"):
        first = layer(x)[0]
    with fc.runner("compiled"):
        torch.testing.assert_close(layer(x)[0], first)
