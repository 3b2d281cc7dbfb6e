"""A cell's first call, which traces and compiles it, under every mode of torch's and Python's that a caller may be in.

The numbers are those of the Python loop outside the mode, the mode sees nothing of the trace, and it is in force
afterwards as it was before.
"""

from __future__ import annotations

import contextlib
import cProfile
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fusecell as fc

# torch's own, where it counts operations and differentiates forward.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def fresh_layer():
    """A layer of a class that has never run."""

    class Fresh(fc.Cell):
        def __init__(self):
            super().__init__(5, 9)
            self.inp, self.rec = nn.Linear(5, 18), nn.Linear(9, 18)

        def step(self, x, state):
            (h,) = state
            gate, new = (self.inp(x) + self.rec(h)).chunk(2, 1)
            gate = self.note("gate", torch.sigmoid(gate))
            h = gate * h + (torch.ones_like(gate) - gate) * torch.tanh(new) + torch.zeros(9, dtype=h.dtype)
            return h, (h,)

    torch.manual_seed(0)
    return fc.Recurrent(Fresh())


def sequence():
    return torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(1))


def gradients(layer, x):
    """Return outputs, last state and, unless grad mode is off, all gradients of a call."""
    leaf = x.clone()
    if torch.is_grad_enabled():
        leaf.requires_grad_()
    y, h = layer(leaf)
    if not y.requires_grad:
        return [y, h]
    layer.zero_grad()
    (y.square().sum() + h.sum()).backward()
    return [y.detach(), h.detach(), leaf.grad, *(parameter.grad.clone() for parameter in layer.parameters())]


class Log(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class FunctionLog(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def changed(read, write, value):
    """Set a process-wide value for the block, and check that nothing inside changes it."""
    before = read()
    write(value)
    try:
        yield
        assert read() == value
    finally:
        write(before)


@contextlib.contextmanager
def deterministic():
    with changed(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True):
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
        assert torch.empty(3).isnan().all()


@contextlib.contextmanager
def anomaly():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Anomaly Detection has been enabled")
        with torch.autograd.detect_anomaly():
            yield
            assert torch.is_anomaly_enabled()
            assert torch.is_anomaly_check_nan_enabled()
            broken = torch.zeros(1, requires_grad=True)
            with torch.enable_grad(), pytest.raises(RuntimeError, match="returned nan"):
                (broken.sqrt() * 0).sum().backward()
    sys.stderr.flush()


@contextlib.contextmanager
def saved_hooks():
    """Use hooks that record the shapes of saved tensors."""
    packed = []

    def pack(value):
        packed.append(tuple(value.shape))
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        yield
        before = len(packed)
        if torch.is_grad_enabled():
            torch.ones(2, requires_grad=True).exp()
            assert len(packed) == before + 1
    # A trace has 11 or 13 rows, or more: three is what the caller has.
    assert not any(size in shape for shape in packed for size in (11, 13))


@contextlib.contextmanager
def module_hooks():
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, result: called.append(module))
    try:
        with warnings.catch_warnings():
            # A hook on all modules may change what a submodule gives: the loop runs, and says so.
            warnings.filterwarnings("ignore", "Fresh runs as a Python loop: Hooks on all modules", fc.EagerWarning)
            yield
        assert any(isinstance(module, fc.Recurrent) for module in called)
        assert any(isinstance(module, nn.Linear) for module in called)
    finally:
        handle.remove()


@contextlib.contextmanager
def logged(log):
    with log:
        yield
        before = len(log.seen)
        torch.ones(2).exp()
        assert len(log.seen) > before
    assert not any("rand.generator" in name or name in ("is_tracing", "step") for name in log.seen)


@contextlib.contextmanager
def counted_flops():
    with FlopCounterMode(display=False) as counter:
        yield
        before = counter.get_total_flops()
        torch.ones(2, 3) @ torch.ones(3, 4)
        assert counter.get_total_flops() == before + 48


@contextlib.contextmanager
def profile_function():
    seen = []
    function = lambda frame, event, arg: seen.append(event)  # noqa: E731
    with changed(sys.getprofile, sys.setprofile, function):
        yield
        before = len(seen)
        sequence()
        assert len(seen) > before


@contextlib.contextmanager
def trace_function():
    seen = []

    def function(frame, event, arg):
        seen.append(event)
        return function

    with changed(sys.gettrace, sys.settrace, function):
        yield
        before = len(seen)
        sequence()
        assert len(seen) > before


@contextlib.contextmanager
def c_profiler():
    profiler = cProfile.Profile()
    profiler.enable()
    try:
        yield
        sequence()
    finally:
        profiler.disable()
    assert any("sequence" in str(entry.code) for entry in profiler.getstats())


@contextlib.contextmanager
def random_state():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        before = torch.random.get_rng_state()
        yield
        assert torch.equal(torch.random.get_rng_state(), before)


@contextlib.contextmanager
def profiler():
    with torch.profiler.profile() as profile, torch.profiler.record_function("a name"):
        yield
    assert "a name" in {event.key for event in profile.key_averages()}


@contextlib.contextmanager
def grad_mode(enabled):
    with torch.set_grad_enabled(enabled):
        yield
        assert torch.is_grad_enabled() == enabled


@contextlib.contextmanager
def inference_mode():
    with torch.inference_mode():
        yield
        assert torch.is_inference_mode_enabled()
        assert torch.ones(1).is_inference()


@contextlib.contextmanager
def autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16


@contextlib.contextmanager
def on_device(name):
    with torch.device(name):
        yield
        assert torch.ones(1).device.type == name


@contextlib.contextmanager
def default_device(name):
    with changed(lambda: torch.get_default_device().type, torch.set_default_device, name):
        yield
        assert torch.ones(1).device.type == name


@contextlib.contextmanager
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        yield
        assert warnings.filters == before


@contextlib.contextmanager
def no_saved_hooks():
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        yield
        with pytest.raises(RuntimeError, match="none here"), torch.autograd.graph.save_on_cpu():
            pass


@contextlib.contextmanager
def floating_point_errors():
    with np.errstate(all="raise"):
        yield
        with pytest.raises(FloatingPointError):
            np.float32(1) / np.float32(0)


@contextlib.contextmanager
def flushed_denormals():
    if not torch.set_flush_denormal(True):
        pytest.skip("not on this CPU")
    try:
        yield
        assert torch.tensor([1e-39]).mul(1.0).item() == 0
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def one_thread_backward():
    with torch.autograd.set_multithreading_enabled(False):
        yield
        assert not torch._C._is_multithreading_enabled()


@contextlib.contextmanager
def allowed_mutation():
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        yield
        if torch.is_grad_enabled():
            value = torch.ones(2, requires_grad=True).clone()
            result = value.square().sum()
            value.zero_()
            result.backward()


def dtype(value):
    return changed(torch.get_default_dtype, torch.set_default_dtype, value)


MODES = {
    "nothing": contextlib.nullcontext,
    "device meta": lambda: on_device("meta"),
    "device cpu": lambda: on_device("cpu"),
    "default device meta": lambda: default_device("meta"),
    "default dtype float64": lambda: dtype(torch.float64),
    "default dtype bfloat16": lambda: dtype(torch.bfloat16),
    "deterministic": deterministic,
    "anomaly": anomaly,
    "module hooks": module_hooks,
    "torch's profiler": profiler,
    "no grad": lambda: grad_mode(False),
    "grad": lambda: grad_mode(True),
    "inference mode": inference_mode,
    "autocast": autocast,
    "a dispatch mode": lambda: logged(Log()),
    "a function mode": lambda: logged(FunctionLog()),
    "flops": counted_flops,
    "random state": random_state,
    "setprofile": profile_function,
    "settrace": trace_function,
    "cProfile": c_profiler,
    "warnings are errors": warnings_are_errors,
    "saved-tensor hooks": saved_hooks,
    "no saved-tensor hooks": no_saved_hooks,
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "numpy's errors": floating_point_errors,
    "flushed denormals": flushed_denormals,
    "backward on one thread": one_thread_backward,
    "mutation allowed": allowed_mutation,
    "torch functions disabled": torch._C.DisableTorchFunction,
    "torch functions of subclasses disabled": torch._C.DisableTorchFunctionSubclass,
}


@pytest.mark.parametrize("mode", MODES)
def test_a_first_call_in_a_mode(mode):
    layer, x = fresh_layer(), sequence()
    with fc.runner("eager"):
        expected = gradients(layer, x)
    with MODES[mode]():
        first, again = gradients(layer, x), gradients(layer, x)
    after = gradients(layer, x)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    for results in (first, after):
        for actual, loop in zip(results, expected, strict=False):
            torch.testing.assert_close(actual, loop, rtol=1e-4, atol=1e-5)
    assert len(after) == len(expected)


# Where a mode wants to see what is computed, or the loop says that it runs, it is the loop.
_LOOPS = ("module hooks", "a dispatch mode", "flops", "mutation allowed")


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in _LOOPS])
def test_a_first_call_in_a_mode_is_compiled(mode):
    """No mode prevents compilation."""
    layer, x = fresh_layer(), sequence()
    with MODES[mode](), fc.runner("compiled"):
        gradients(layer, x)
    assert fc.explain(layer).runner == "compiled"


@pytest.mark.parametrize("library", [nn, fc], ids=["torch.nn", "fusecell"])
def test_a_first_call_in_a_checkpoint(library):
    """Torch counts what is saved, in the forward and when it is run again."""
    fc.refresh()
    layer, x = library.GRU(6, 8), torch.randn(7, 4, 6, requires_grad=True)
    output = checkpoint(lambda value: layer(value)[0], x, use_reentrant=False)
    (gradient,) = torch.autograd.grad(output.square().sum(), x)
    (plain,) = torch.autograd.grad(layer(x)[0].square().sum(), x)
    assert torch.equal(gradient, plain)


def test_a_first_call_of_fake_tensors():
    layer, x = fresh_layer(), sequence()
    with fc.runner("eager"):
        expected = gradients(layer, x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y, h = layer(mode.from_tensor(x))
        assert y.shape == (6, 3, 9)
        assert h.shape == (3, 9)
        assert type(torch.ones(1)) is not torch.Tensor
    for actual, loop in zip(gradients(layer, x), expected, strict=True):
        torch.testing.assert_close(actual, loop, rtol=1e-4, atol=1e-5)


TRANSFORMS = {
    "vmap": lambda layer, x: torch.func.vmap(lambda value: layer(value)[0], in_dims=1, out_dims=1)(x),
    "grad": lambda layer, x: torch.func.grad(lambda value: layer(value)[0].square().sum())(x),
    "jvp": lambda layer, x: torch.func.jvp(lambda value: layer(value)[0], (x,), (x.cos(),))[1],
    "functional_call": lambda layer, x: torch.func.functional_call(layer, dict(layer.named_parameters()), (x,))[0],
    "per-sample gradients": lambda layer, x: torch.func.vmap(
        torch.func.grad(lambda value: layer(value)[0].square().sum()), in_dims=1, out_dims=1
    )(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_first_call_in_a_transform(transform):
    layer, x = fresh_layer(), sequence()
    actual = TRANSFORMS[transform](layer, x)
    with fc.runner("eager"):
        torch.testing.assert_close(actual, TRANSFORMS[transform](layer, x), rtol=1e-4, atol=1e-5)
    gradients(layer, x)
    torch.testing.assert_close(actual, TRANSFORMS[transform](layer, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["nothing", "saved-tensor hooks", "no grad", "device meta"])
def test_a_first_call_in_a_thread(mode):
    """A new thread has none of the modes of the thread that started it."""
    layer, x, results = fresh_layer(), sequence(), []
    with fc.runner("eager"):
        expected = gradients(layer, x)
    thread = threading.Thread(target=lambda: results.extend(gradients(layer, x)))
    with MODES[mode]():
        thread.start()
        thread.join()
    for actual, loop in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, loop, rtol=1e-4, atol=1e-5)


def test_a_mode_sees_nothing_of_a_trace():
    """A function mode logs the same for a first call, which traces, as for a second cell of the class."""
    layer, x, seen = fresh_layer(), sequence(), []
    for each in (layer, fc.Recurrent(type(layer.cell)())):
        with FunctionLog() as log:
            gradients(each, x)
        # Looks at sizes and dtypes decide what is traced.
        seen.append([name for name in log.seen if name not in ("__get__", "data_ptr", "is_floating_point")])
    assert seen[0] == seen[1]
    assert "sigmoid" not in seen[0]


def test_saved_tensor_hooks_see_the_calls_own():
    """As many tensors are saved in a first call as in a second."""
    layer, x, counts = fresh_layer(), sequence(), []
    for each in (layer, fc.Recurrent(type(layer.cell)())):
        packed = []

        def pack(value, packed=packed):
            packed.append(value)
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            gradients(each, x)
        counts.append(len(packed))
    assert counts[0] == counts[1] > 0
