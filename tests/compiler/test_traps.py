"""What a process may have set, or does with a layer, around a compiled call: each as a plain loop has it."""

from __future__ import annotations

import copy
import cProfile
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import fusecell as fc
from fusecell.compiler.backend import llvm
from fusecell.compiler.backend.target import _needed


class Fresh(fc.Cell):
    """A cell of which a test makes a class of its own, so that it is traced for the first time there."""

    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size)
        self.inp = nn.Linear(input_size, hidden_size)
        self.rec = nn.Linear(hidden_size, hidden_size)
        self.register_buffer("gain", torch.tensor(0.7))

    def step(self, x, state):
        (h,) = state
        z = torch.sigmoid(self.rec(h))
        new = torch.tanh(nn.functional.layer_norm(self.inp(x) * self.gain, (self.hidden_size,)))
        h = (1 - z) * new + z * h
        return h, (h,)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return fc.Recurrent(type("Own", (Fresh,), {})(5, 9))


def both(layer, x, **options):
    """What the compiled and the eager runner give."""
    found = []
    for name in ("compiled", "eager"):
        with fc.runner(name):
            found.append(layer(x, **options)[0])
    return found


def learned(layer, x):
    """The gradient of the input weight."""
    layer.zero_grad()
    with fc.runner("compiled"):
        layer(x)[0].square().sum().backward()
    return layer.cell.inp.weight.grad.clone()


def test_traced_in_inference_mode_and_trained_afterwards(layer):
    x = torch.randn(6, 3, 5)
    with torch.inference_mode():
        mine, loop = both(layer, x)
    torch.testing.assert_close(mine, loop)
    found = learned(layer, x)
    layer.zero_grad()
    with fc.runner("eager"):
        layer(x)[0].square().sum().backward()
    torch.testing.assert_close(found, layer.cell.inp.weight.grad)


def test_inference_tensors_as_input_of_training(layer):
    """torch's own layers raise the same."""
    with torch.inference_mode():
        x = torch.randn(6, 3, 5)
    for model in (nn.GRU(5, 9), layer):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            model(x)
    learned(layer, x.clone())


def test_a_default_device_and_dtype_are_not_the_traces(layer):
    x = torch.randn(6, 3, 5)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.no_grad():
            mine, loop = both(layer, x)
    finally:
        torch.set_default_dtype(before)
    assert mine.dtype is torch.float32
    torch.testing.assert_close(mine, loop)


def test_tracing_draws_nothing(layer):
    before = torch.random.get_rng_state()
    learned(layer, torch.zeros(6, 3, 5))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_first_call_under_autocast_a_transform_or_a_mode(layer):
    x = torch.randn(6, 3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        mine, loop = both(layer, x)
    torch.testing.assert_close(mine, loop)
    with torch.no_grad():
        mapped = torch.func.vmap(lambda row: layer(row)[0], in_dims=1, out_dims=1)(x)
    torch.testing.assert_close(mapped, loop)


def test_first_call_under_a_profiler(layer):
    """Python's own profiler, which can't be put back once it is taken away."""
    x = torch.randn(6, 3, 5)
    profiler = cProfile.Profile()
    with torch.no_grad():
        mine, loop = profiler.runcall(both, layer, x)
    torch.testing.assert_close(mine, loop)
    assert any("both" in str(entry.code) for entry in profiler.getstats())


def test_first_call_under_a_profile_function(layer):
    seen = []
    sys.setprofile(lambda frame, event, arg: seen.append(event))
    try:
        with torch.no_grad():
            mine, loop = both(layer, torch.randn(6, 3, 5))
        assert sys.getprofile() is not None
    finally:
        sys.setprofile(None)
    torch.testing.assert_close(mine, loop)
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
        mine, loop = both(fc.Recurrent(names["Typed"](7, 7)), torch.randn(6, 3, 7))
    torch.testing.assert_close(mine, loop)


class Doubled(torch.Tensor):
    """Twice what it holds; itself without memory, as quantised and distributed weights are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        plain = [2 * value.inner if isinstance(value, cls) else value for value in args]
        return func(*plain, **(kwargs or {}))


@pytest.mark.parametrize("training", [False, True])
def test_weights_that_are_a_subclass_of_tensor(training):
    """A kernel would have read at address 0."""
    fc.refresh()  # so that it warns once more
    layer, x = fc.Recurrent(fc.GRUCell(5, 9)), torch.randn(6, 3, 5)
    weight = layer.cell.weight_ih.detach()
    layer.cell.weight_ih = nn.Parameter(Doubled(weight), requires_grad=False)
    with torch.set_grad_enabled(training):
        with pytest.warns(fc.EagerWarning, match="weight_ih is a Doubled, a subclass of Tensor"):
            found = layer(x)[0]
        layer.cell.weight_ih = nn.Parameter(2 * weight)
        torch.testing.assert_close(found, layer(x)[0])


def test_copied_and_pickled_after_it_ran():
    torch.manual_seed(1)
    layer, x = fc.Recurrent(fc.LSTMCell(5, 9)), torch.randn(6, 3, 5)
    expected = layer(x)[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], expected)
        with torch.no_grad():
            other.cell.weight_ih.mul_(2)
        assert not torch.equal(other(x)[0], expected)
    assert torch.equal(layer(x)[0], expected)


def test_cells_that_share_weights(layer):
    other = type(layer.cell)(5, 9)
    other.inp = layer.cell.inp
    x = torch.randn(6, 3, 5)
    with torch.no_grad():
        fc.scan(other, x)
        layer.cell.inp.weight.mul_(3)
        for mine, loop in (both(layer, x), both(fc.Recurrent(other), x)):
            torch.testing.assert_close(mine, loop)


@pytest.mark.parametrize(
    "arranged",
    {
        "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "every second feature": lambda x: x.repeat_interleave(2, -1)[..., ::2],
        "features first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "one step for all": lambda x: x[:1].expand(x.shape),
        "one row for all": lambda x: x[:, :1].expand(x.shape),
        "one feature for all": lambda x: x[..., :1].expand(x.shape),
        "windows that overlap": lambda x: x.flatten()[:50].as_strided((6, 3, 5), (2, 7, 1)),
        "not at the start of its memory": lambda x: torch.cat((x.new_zeros(3), x.flatten()))[3:].view(x.shape),
    }.items(),
    ids=lambda item: item[0],
)
def test_layouts(layer, arranged):
    x = arranged[1](torch.randn(6, 3, 5))
    with torch.no_grad():
        with fc.runner("compiled"):
            assert torch.equal(layer(x)[0], layer(x.contiguous())[0])
        mine, loop = both(layer, x)
    torch.testing.assert_close(mine, loop)
    assert torch.equal(learned(layer, x), learned(layer, x.contiguous()))


def test_states_in_any_layout():
    cell, x = fc.LSTMCell(5, 9), torch.randn(6, 3, 5)
    plain = (torch.randn(3, 9), torch.randn(3, 9))
    strange = (plain[0].t().contiguous().t(), plain[1].repeat_interleave(2, 1)[:, ::2])
    with fc.runner("compiled"):
        for mine, expected in zip(fc.scan(cell, x, strange)[1], fc.scan(cell, x, plain)[1], strict=True):
            assert torch.equal(mine, expected)


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
    assert all(torch.equal(found, results[0]) for found in results)
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
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


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
            mine, loop = both(fc.Recurrent(Scaled(3, 3)), x)
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(mine, loop)
        assert mine.abs().max() == 0
        # Afterwards torch has them again, though a kernel has run.
        fc.scan(Scaled(3, 3), x)
        assert (torch.tensor(1e-19) * torch.tensor(1e-20)).item() != 0


@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3"])
def test_levels_without_and_with_fma(level, monkeypatch, zoo_cell):
    """Accurate on both, and on each the same bits for a row alone and in pieces."""
    if not llvm.host().features.issuperset(_needed(level)):
        pytest.skip(f"this CPU is below {level}")
    monkeypatch.setenv("FUSECELL_TARGET", level)
    torch.manual_seed(2)
    cell = zoo_cell.make(5, 13)
    x = torch.randn(9, 5, 5)
    fc.refresh()  # what was compiled for the other level
    try:
        with torch.no_grad(), fc.runner("compiled"):
            y, _ = fc.scan(cell, x)
            alone, _ = fc.scan(cell, x[:, 2:3])
            first, state = fc.scan(cell, x[:4])
            rest, _ = fc.scan(cell, x[4:], state)
    finally:
        fc.refresh()
    assert torch.equal(alone, y[:, 2:3])
    assert torch.equal(torch.cat((first, rest)), y)
    with torch.no_grad(), fc.runner("eager"):
        exact, eager = fc.scan(cell.double(), x.double())[0], fc.scan(cell.float(), x)[0]
    largest = exact.abs().max()
    assert (y - exact).abs().max() / largest <= max(4 * (eager - exact).abs().max() / largest, 2e-6)


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
        done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr.decode()
