"""What training computes and saves for the backward: in the plan, the summary and memory."""

from __future__ import annotations

import pytest
import torch

import fusecell as fc
from fusecell.compiler.programs.allocation import new_aligned
from fusecell.compiler.programs.autograd import compile_trainable
from fusecell.compiler.refusal import Refusal
from tests.compiler.tuned import tuned

SOURCES = ("x", "weight_ih", "weight_hh", "bias_ih", "bias_hh")


@pytest.mark.parametrize(
    "required",
    [(), ("x",), ("weight_ih",), ("weight_hh", "bias_hh"), ("bias_ih",), ("x", "weight_hh"), SOURCES],
    ids=lambda required: "+".join(required) or "a state only",
)
def test_unneeded_gradients_are_not_computed(required):
    trainable = compile_trainable(fc.GRUCell(5, 7), [(5,)], torch.float32)
    assert not isinstance(trainable, Refusal)
    names = ("x", *trainable.traced.weight_names)
    assert sorted(names) == sorted(SOURCES)
    plan = trainable.training([name in required for name in names], recompute=False).backward.kernel.plan
    gradients = {label for label in plan.graph.outputs if not label.startswith("state.")}
    kinds = {name: "input" if name == "x" else "weight" for name in SOURCES}
    assert gradients == {f"grad.{kinds[name]}.{name}" for name in required}
    assert {total.label for total in plan.sums} == gradients - {"grad.input.x"}
    # Each sum is of what it needs: biases of gates alone, weights of gates times what they were multiplied with.
    assert {total.label for total in plan.sums if total.a is not None} == {
        label for label in gradients if "weight_" in label
    }
    # And only the gradients of x and of the state take products with weights.
    read = {plan.graph[index].name for index in plan.graph.leaves("weight")}
    assert read == {"weight_hh"} | ({"weight_ih"} if "x" in required else set())


def saved_numbers(layer, x):
    """Count the numbers that autograd saves for a backward, without parameters and arguments."""
    owned = {value.untyped_storage().data_ptr() for value in (x, *layer.parameters())}
    saved = {}

    def pack(value):
        if value.untyped_storage().data_ptr() not in owned:
            saved[value.untyped_storage().data_ptr()] = value.numel()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        y, after = layer(x)
    returned = (y, *(after if isinstance(after, tuple) else (after,)))
    assert not {value.untyped_storage().data_ptr() for value in returned} & set(saved)  # the caller may write to those
    return sum(saved.values())


KEPT = {
    "gru": (lambda **how: fc.Recurrent(fc.GRUCell(5, 23), **how), 5 * 32, 32),
    "lstm": (lambda **how: fc.Recurrent(fc.LSTMCell(5, 32), **how), 7 * 32, 2 * 32),
    "rnn": (lambda **how: fc.Recurrent(fc.RNNCell(5, 32), **how), 2 * 32, 32),
    "leaky": (lambda **how: fc.Recurrent(fc.cells.LeakyCell(5, 32), **how), 2 * 32, 32),
    "layers of GRU": (lambda **how: fc.GRU(5, 32, bidirectional=True, **how), 2 * 5 * 32, 2 * 32),
}


@pytest.mark.parametrize("recompute", ["no", "layer", "block"])
@pytest.mark.parametrize("kind", KEPT)
def test_saved_bytes_match_the_summary(kind, recompute):
    steps, rows = 31, 7
    make, numbers, states = KEPT[kind]
    layer, x = make(recompute=recompute == "layer"), torch.randn(steps, rows, 5)
    layer(x)[0].sum().backward()  # the trace of a step saves tensors of its own
    with fc.recompute(recompute == "block"):
        layer(x)[0].sum().backward()
        saved, predicted = saved_numbers(layer, x), fc.summary(layer, steps, rows).saved // 4
    assert predicted == steps * rows * (numbers if recompute == "no" else states)
    # Beside it: the states that each sequence began with, and room to align.
    assert predicted <= saved <= predicted + 2 * (rows * 32 * 2 + 64)


def moved(value):
    """A copy at an address that is no multiple of a cache line, as that of an array of NumPy's may be."""
    copy = value.new_empty(value.numel() + 4)[4:].view(value.shape)
    return copy.copy_(value)


def copied(value):
    """A copy at an address that is one, wherever the value lay."""
    return value.clone(memory_format=torch.contiguous_format)


def of_members(layer, x):
    """The outputs for each half of the rows, by a kernel each."""
    return torch.func.vmap(lambda half: layer(half)[0], in_dims=1, out_dims=1)(x.unflatten(1, (2, -1)))


RUNS = {"a call": lambda layer, x: layer(x)[0], "members": of_members}


@pytest.mark.parametrize("copy", [moved, copied])
@pytest.mark.parametrize("huge", [False, True])
@pytest.mark.parametrize("kind", RUNS)
def test_what_is_saved_may_be_copied(monkeypatch, kind, huge, copy):
    """As by hooks that keep it on disk: kernels read the copy, wherever it lies."""
    if huge:
        tuned(monkeypatch, huge_result_bytes=1 << 17)
    torch.manual_seed(0)
    layer, x = fc.Recurrent(fc.GRUCell(5, 7)), torch.randn(40, 32, 5, requires_grad=True)

    def gradients(y):
        return torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))

    expected = gradients(RUNS[kind](layer, x))
    with torch.autograd.graph.saved_tensors_hooks(copy, lambda value: value):
        y = RUNS[kind](layer, x)
    assert all(map(torch.equal, gradients(y), expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_for_what_is_saved_is_aligned(monkeypatch, dtype):
    tuned(monkeypatch, huge_result_bytes=1 << 10)
    for shape in ((1,), (7,), (300,), (3, 48), (50, 1001), (2, 1 << 19)):
        memory = new_aligned(torch.empty(0, dtype=dtype), *shape)
        assert memory.data_ptr() % 64 == 0
        assert (memory.shape, memory.dtype, memory.is_contiguous()) == (shape, dtype, True)
