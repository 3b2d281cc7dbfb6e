"""Steps of hundreds and thousands of operations: compiled with the Python loop's numbers, or refused by their size."""

from __future__ import annotations

import sys
import time

import pytest
import torch

import fusecell as fc
from fusecell.compiler.codegen import emit
from fusecell.compiler.frontend import recorder, trace
from fusecell.compiler.ir.graph import Builder, Graph
from fusecell.compiler.ir.interpreter import interpret
from fusecell.compiler.ir.sizes import DType
from fusecell.compiler.ir.traversal import resolve
from fusecell.compiler.runtime.kernel import compile_graph
from fusecell.compiler.schedule import weight_gradients
from fusecell.compiler.schedule.scheduler import plan
from fusecell.compiler.transforms.passes import optimise
from tests.compiler.traced_cells import partitioned


class Deep(fc.Cell):
    """A step of ``count`` pointwise operations in a chain, of several kinds."""

    def __init__(self, kind: str, count: int) -> None:
        super().__init__(4, 4)
        self.kind, self.count = kind, count
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 0.9, 4))

    def step(self, x, state):
        u = x * self.weight + state[0]
        if self.kind == "chain":
            for _ in range(self.count // 2):
                u = torch.tanh(u * 1.01)
        elif self.kind == "shared":  # each value is used three times: a walk that forgets what it has seen takes 3^n
            for _ in range(self.count // 4):
                u = u * u * 0.5 + u * 0.5
        elif self.kind == "inputs":  # the same of x alone, which is computed wherever it is used
            v = x
            for _ in range(self.count // 4):
                v = v * v * 0.5 + v * 0.5
            u = u + v
        elif self.kind == "parts":  # slices that sink through what is shared
            v = torch.cat((u, x), 1) * 0.5
            for _ in range(self.count // 4):
                v = v * v * 0.5 + v * 0.5
            u = v[:, :4] + v[:, 4:]
        elif self.kind == "wide":  # many values at once, all of them needed at the end
            values = [u]
            for place in range(self.count // 2):
                values.append(torch.sigmoid(values[place // 2] * 0.7))
            while len(values) > 1:
                values = [sum(values[i : i + 2]) * 0.5 for i in range(0, len(values), 2)]
            u = values[0]
        return u, (u,)


def results(cell, x):
    cell.zero_grad()
    leaf = x.clone().requires_grad_()
    y, state = fc.scan(cell, leaf)
    (y * torch.arange(1.0, 5.0, dtype=y.dtype)).sum().backward()
    with torch.no_grad():
        plain, _ = fc.scan(cell, x)
    return [plain, y.detach(), state.detach(), leaf.grad, cell.weight.grad.clone()]


def check(kind, count):
    torch.manual_seed(0)
    cell, x = Deep(kind, count).double(), torch.randn(3, 2, 4, dtype=torch.float64) * 0.3
    with fc.runner("compiled"):
        compiled = results(cell, x)
    with fc.runner("eager"):
        expected = results(cell, x)
    for actual, loop in zip(compiled, expected, strict=True):
        torch.testing.assert_close(actual, loop, rtol=1e-9, atol=1e-12)


KINDS = ("chain", "shared", "inputs", "parts", "wide")


@pytest.mark.parametrize("kind", KINDS)
def test_five_hundred_operations(kind):
    check(kind, 500)


@pytest.mark.parametrize(
    ("kind", "count"), [pytest.param("chain", 2000, marks=pytest.mark.long), ("shared", 2000), ("wide", 1000)]
)
def test_thousands_of_operations(kind, count):
    check(kind, count)


def test_explain_and_the_call_of_a_deep_cell():
    explanation = fc.explain(fc.Recurrent(Deep("chain", 800)))
    assert (explanation.runner, explanation.training_runner, explanation.reasons) == ("compiled", "compiled", ())


@pytest.mark.parametrize("kind", KINDS)
def test_no_stage_recurses_as_deep_as_the_graph(kind):
    """The recursion limit is little more than a shallow step needs."""
    cell = Deep(kind, 1200)
    traced = trace(cell, [(4,)], torch.float32, gradients=True)
    frame, depth = sys._getframe(), 0
    while frame is not None:
        frame, depth = frame.f_back, depth + 1
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(depth + 60)
    try:
        from fusecell.compiler.backend.target import host_target

        graphs = partitioned(traced)
        for graph, backward in ((graphs.forward, False), (graphs.backward, True)):
            assert Graph.parse(graph.text).text == graph.text
            assert emit(plan(optimise(graph)[-1][1], backward=backward), host_target()).text
    finally:
        sys.setrecursionlimit(before)


@pytest.mark.parametrize("kind", KINDS)
def test_twice_the_operations_take_about_twice_as_long(kind):
    """Time is counted in Python calls of the compiler's stages, so that other load doesn't matter."""

    def calls(count):
        seen = 0

        def profile(frame, event, arg):
            nonlocal seen
            seen += event == "call"

        from fusecell.compiler.backend.target import host_target

        traced = trace(Deep(kind, count), [(4,)], torch.float32, gradients=True)
        sys.setprofile(profile)
        try:
            graphs = partitioned(traced)
            for graph, backward in ((graphs.forward, False), (graphs.backward, True)):
                emit(plan(optimise(graph)[-1][1], backward=backward), host_target())
        finally:
            sys.setprofile(None)
        return seen

    calls(64)  # what is made once
    assert calls(800) < 2.5 * calls(400)


def test_a_step_that_is_too_large_is_refused_by_its_size(monkeypatch):
    monkeypatch.setattr(recorder, "MOST_NODES", 300)
    explanation = fc.explain(Deep("chain", 400))
    assert (explanation.runner, explanation.training_runner) == ("eager", "eager")
    assert "The step is too large: 301 values in its graph, and there may be 300 [aten.tanh" in explanation.reasons[0]
    fc.refresh()
    explanation = fc.explain(Deep("chain", 180))
    assert (explanation.runner, explanation.training_runner) == ("compiled", "eager")
    assert "values in its graph, its gradient's included, and there may be 300" in explanation.reasons[0]
    fc.refresh()


def test_a_million_operations_are_refused_at_the_limit(monkeypatch):
    """The tracer stops at the limit, not after tracing all operations."""
    monkeypatch.setattr(recorder, "MOST_NODES", 2000)
    began = time.process_time()
    explanation = fc.explain(Deep("shared", 10**6))
    assert "and there may be 2,000" in explanation.reasons[0]
    assert time.process_time() - began < 60


def test_a_weight_used_too_often_is_refused_by_number(monkeypatch):
    class Often(fc.Cell):
        def __init__(self):
            super().__init__(4, 4)
            self.weight = torch.nn.Parameter(torch.ones(4))

        def step(self, x, state):
            u = x + state[0]
            for _ in range(40):
                u = torch.tanh(u * self.weight)
            return u, (u,)

    monkeypatch.setattr(weight_gradients, "MOST_SUMS", 39)
    explanation = fc.explain(Often())
    assert (explanation.runner, explanation.training_runner) == ("compiled", "eager")
    assert explanation.reasons == (
        "Often, with gradients: The step uses its weights 40 times, and each use is a sum in the gradient: "
        "at most 39 are compiled.",
    )


def test_a_saved_graph_of_slices_of_slices():
    """A stream's file may hold a graph that no trace gives."""
    builder = Builder("step", DType("f64"))
    x = builder.append("input", (), {"shape": [3000]}, "x")
    state = builder.append("state", (), {"shape": [1]}, "h")
    part = x
    for start in range(1, 2999):
        part = builder.append("slice", (part,), {"start": 1, "stop": 3001 - start}, None)
    graph = builder.build({"output": builder.add("add", part, part), "state.h": state}, keep_all=True)
    values = {"x": torch.randn(2, 3000, dtype=torch.float64), "h": torch.zeros(2, 1, dtype=torch.float64)}
    expected = interpret(graph, values)["output"]
    assert compile_graph(graph).macs == 0
    torch.testing.assert_close(interpret(optimise(graph)[-1][1], values)["output"], expected)


def test_resolve_equals_its_recursive_form():
    args = {0: (), 1: (0,), 2: (1, 0), 3: (2, 1, 2)}
    order = []

    def compute(key):
        order.append(key)
        return 1 + sum(table[arg] for arg in args[key])

    table: dict[int, int] = {}
    assert resolve(3, table, args.__getitem__, compute) == 1 + 4 + 2 + 4
    assert order == [0, 1, 2, 3]
    assert resolve(3, table, args.__getitem__, compute) == 11
    assert len(order) == 4
