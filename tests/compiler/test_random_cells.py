"""Random cells against the Python loop, 60 here and another 60 in the check mode.

``python -m tests.compiler.random_cells`` tries any number of others.
"""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import nn
from torch.nn import functional as F

import fusecell as fc
from fusecell.compiler.backend import llvm
from fusecell.compiler.runtime import guard_pages as check
from tests.compiler import force_threads
from tests.compiler.cell_recipes import Call, Op, Recipe, Weight, check_backward, check_forward, source
from tests.compiler.random_cells import calls, outcome, recipes
from tests.compiler.tuned import tuned


@pytest.mark.parametrize("part", [*range(3), "two threads"])
def test_random_cells_equal_the_python_loop(part, monkeypatch):
    """Some as users run them, the others without LLVM's optimiser, which takes most of the time."""
    if part:
        monkeypatch.setattr(llvm, "EFFORT", 0)
        monkeypatch.setenv("FUSECELL_CACHE", "off")  # where nobody should find such code
    threads, before = 1 + (part == "two threads"), torch.get_num_threads()
    if threads > 1:
        force_threads.always(monkeypatch)
        tuned(monkeypatch, chunk_bytes=1 << 13)

    @seed((3 if threads > 1 else part) + 4 * check.ENABLED)
    @settings(
        max_examples=15,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(recipes(), calls())
    def each(recipe, call):
        outcome(check_forward, recipe, call)
        outcome(check_backward, recipe, call)

    torch.set_num_threads(threads)
    try:
        each()
    finally:
        torch.set_num_threads(before)


def test_a_failure_prints_a_program(monkeypatch):
    """What is printed makes the same cell and the same data."""
    recipe = Recipe(
        3, (2,), 2, (Weight("w0", "nn.Parameter(torch.randn(2, 5))"),), (),
        (Op("v0", "torch.tanh(torch.cat((x, h0), 1) @ self.w0.t())", ("x", "h0")),), "v0", ("v0",),
    )  # fmt: skip
    call = Call(4, 3, 5, state=True, lengths=(4, 0, 2), reverse=True)
    namespace: dict = {}
    exec(source(recipe, call), namespace)
    seen = []
    monkeypatch.setattr(
        "tests.compiler.cell_recipes._compiled", lambda data, *_: seen.append(data.run("compiled")) or []
    )
    with pytest.raises(ValueError, match="zip"):
        check_forward(recipe, call)
    y, after = seen[0]
    assert torch.equal(namespace["y"], y)
    assert torch.equal(namespace["after"], after)


# What random cells found, each as small as it was printed.


class Nothing(fc.Cell):
    """States that need x alone, through products hoisted out of the loop."""

    states = ("a", "b")

    def __init__(self):
        super().__init__(2, 3)
        self.state_sizes = (3, 2)
        self.output_size = 2
        self.w, self.v = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2, 6))

    def step(self, x, state):
        return x, (torch.tanh(F.linear(x, self.w)), torch.tanh(F.linear(x, self.v[:, 1:3])))


class Joined(fc.Cell):
    """Concatenations of cheap values, of a reduction's operand, of concatenations, and of hoisted values."""

    def __init__(self):
        super().__init__(2, 3)
        self.output_size = 14
        self.w = nn.Parameter(torch.randn(3, 2))

    def step(self, x, state):
        (h,) = state
        both = torch.cat((x, x), 1)
        other = torch.cat((both, x + x, both.mean(-1, keepdim=True), torch.tanh(x), F.linear(x, self.w)), -1)
        h = torch.tanh(h + F.linear(x, self.w))
        return torch.cat((other, x.flip(1)), 1), (h,)


class Padded(fc.Cell):
    """Numbers that are operands, and gradients that come in parts."""

    states = ("h", "c")

    def __init__(self):
        super().__init__(3, 2)
        self.state_sizes = (2, 3)
        self.output_size = 4
        self.w, self.v = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(3, 5))

    def step(self, x, state):
        h, c = state
        flipped = h.flip(1)
        products = (flipped[:, :2, None] * flipped[:, None, :2].tanh()).flatten(1)
        after = torch.tanh(F.linear(F.pad(x, (1, 2)), self.w))
        return products, (after, torch.tanh(F.linear(torch.cat((x, F.pad(c, (1, 1)).abs()[:, :2]), -1), self.v)))


class Cut(fc.Cell):
    """A cheap value that is used whole and in parts."""

    def step(self, x, state):
        (h,) = state
        twice = x * 2
        other = torch.cat([x.abs(), twice[:, :1]], -1)
        h = torch.tanh(h + twice[:, 1:3].sum(-1, keepdim=True) + twice + other[:, 1:] * other[:, :-1])
        return h, (h,)


class Stepped(fc.Cell):
    """A gradient of zeros, whatever comes in."""

    def __init__(self):
        super().__init__(3, 3)
        self.w = nn.Parameter(torch.randn(3, 3))

    def step(self, x, state):
        (h,) = state
        return torch.floor(F.linear(h, self.w)), (torch.tanh(h + x),)


class Normed(fc.Cell):
    """The sum of squares of a part of an input's gradient, before the loop."""

    def __init__(self):
        super().__init__(3, 5)
        self.output_size = 8
        self.w = nn.Parameter(torch.randn(3, 5))

    def step(self, x, state):
        (h,) = state
        new = F.linear(h, self.w)
        return torch.cat((new.flip(1), F.rms_norm(h, (5,))), -1), (torch.tanh(F.linear(x + new, self.w.t())),)


class Grouped(fc.Cell):
    """Values saved for backward in parts, computed where they are stored."""

    def __init__(self):
        super().__init__(6, 1)
        self.output_size = 9
        self.w = nn.Parameter(torch.randn(3, 6))

    def step(self, x, state):
        (h,) = state
        new = F.linear(x * torch.sigmoid(x), self.w).flip(1)
        return torch.cat((new, x.unflatten(1, (2, 3)).log_softmax(-1).flatten(1)), -1), (h,)


class Sliced(fc.Cell):
    """An output that is a part of what is computed before the loop."""

    def __init__(self):
        super().__init__(5, 2)
        self.output_size = 3
        self.w, self.v = nn.Parameter(torch.randn(10, 5)), nn.Parameter(torch.randn(2, 10))

    def step(self, x, state):
        new = F.linear(x, self.w).softmax(-1)
        return new[:, 6:9], (torch.tanh(F.linear(new, self.v)),)


@pytest.mark.parametrize("make", [Nothing, Joined, Padded, lambda: Cut(5, 5), Stepped, Normed, Grouped, Sliced])
def test_regressions_from_random_cells(make):
    torch.manual_seed(0)
    cell = make().double()
    x = torch.randn(4, 3, cell.input_size, dtype=torch.float64)
    seen = {}
    for name in ("compiled", "eager"):
        cell.zero_grad()
        leaf = x.clone().requires_grad_()
        with fc.runner(name):
            y, after = fc.scan(cell, leaf, lengths=[4, 0, 3])
            results = (y, *(after if isinstance(after, tuple) else (after,)))
            sum((value * torch.arange(1, 1 + value.shape[-1])).sum() for value in results).backward()
        grads = [torch.zeros(()) if p.grad is None else p.grad.clone() for p in cell.parameters()]
        seen[name] = [value.detach() for value in results] + [leaf.grad, *grads]
    for actual, loop in zip(seen["compiled"], seen["eager"], strict=True):
        torch.testing.assert_close(actual, loop, rtol=1e-11, atol=1e-11)
