"""Random graphs around one nest, and their kernels against the interpreter; for the tests of nests.

All numbers are small integers, of which every sum in any order is exact: results are compared without a tolerance, in
single precision as well, and equal elements, of which a position is the first one's, are common.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fusecell.compiler.ir.graph import Builder, Graph
from fusecell.compiler.ir.interpreter import interpret
from fusecell.compiler.ir.sizes import DType
from fusecell.compiler.programs.inference import run_all
from fusecell.compiler.programs.launch import run
from fusecell.compiler.runtime.kernel import compile_graph
from fusecell.execution.options import Options

__all__ = ["NESTS", "SUMS", "NestCase", "check", "kernel_results", "nests", "sums"]

NESTS = ("view", "gather", "interleave", "reduce", "scan", "contract", "take", "scatter_add", "argsort")
SUMS = ("contract_sum", "scatter_sum")
Draw = st.DrawFn
STEPS = 3
_ODD = (float("nan"), float("inf"), float("-inf"))
EXTENTS = (1, 2, 3, 5, 7, 8, 15, 16, 17, 19, 32, 33)
_MOST = 700
"""Features of a value, at the most."""


@dataclass(frozen=True)
class NestCase:
    """A graph and the size of a call.

    Attributes:
        odd: numbers that some elements are instead of small integers.
        uniform: whether numbers are uniform in [-1, 1) instead, whose sums are rounded.
    """

    graph: Graph
    rows: int
    seed: int
    odd: tuple[float, ...] = ()
    uniform: bool = False


def _extents(draw: Draw, count: int, most: int = _MOST) -> list[int]:
    extents: list[int] = []
    for _ in range(count):
        room = max(1, most // math.prod(extents))
        extents.append(draw(st.sampled_from([each for each in EXTENTS if each <= room])))
    return extents


def _access(draw: Draw, shape: list[int]) -> tuple[int, list[int], int]:
    """Draw an access of a shape: offset, strides, and the least size of the value."""
    order = draw(st.permutations(range(len(shape))))
    strides, reach = [0] * len(shape), 1
    for axis in order:
        kind = draw(st.sampled_from(["next", "next", "next", "zero", "gap", "back", "window"]))
        stride = {"zero": 0, "gap": reach + 1, "window": 1}.get(kind, reach)
        if stride * shape[axis] > 4 * _MOST:
            stride = 0
        strides[axis] = -stride if kind == "back" else stride
        reach = max(reach, 1 + sum(abs(s) * (n - 1) for s, n in zip(strides, shape, strict=True)))
    low = sum(min(s, 0) * (n - 1) for s, n in zip(strides, shape, strict=True))
    high = sum(max(s, 0) * (n - 1) for s, n in zip(strides, shape, strict=True))
    before = draw(st.sampled_from([0, 0, 1, 5]))
    return before - low, strides, before - low + high + 1 + draw(st.sampled_from([0, 0, 3]))


class _Graphs:
    """Writer of the graph around a nest: operands of any kind, and something that reads the result."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.builder = Builder("nest", DType(draw(st.sampled_from(["f32", "f64"]))))
        self.states: list[tuple[str, int]] = []

    def leaf(self, op: str, size: int) -> int:
        return self.builder.append(op, (), {"shape": [size]}, f"{op}{len(self.builder.nodes)}")

    def operand(self, size: int, *, row: bool = False) -> int:
        """Draw a value of some size: one of the caller's, a state, a weight, or computed in any phase."""
        add, draw = self.builder.add, self.draw
        kinds = ["input", "state", "computed", "hoisted", "slice", "slice of a state", "concat"]
        kind = draw(st.sampled_from(kinds if row else [*kinds, "weight", "matrix", "of weights"]))
        if kind == "input":
            return self.leaf("input", size)
        if kind == "state":
            return self.state(size)
        if kind == "weight":
            return self.leaf("weight", size)
        if kind == "matrix":
            lines = next(lines for lines in (7, 5, 3, 2, 1) if size % lines == 0)
            shape = [lines, size // lines]
            return self.builder.append("weight", (), {"shape": shape}, f"matrix{len(self.builder.nodes)}")
        if kind == "of weights":
            return add("neg", self.leaf("weight", size))
        if kind == "hoisted":
            return add("neg", self.leaf("input", size))
        if kind == "slice":
            return add("slice", self.leaf("input", size + 3), start=2, stop=2 + size)
        if kind == "slice of a state":
            return add("slice", self.state(size + 3), start=1, stop=1 + size)
        if kind == "concat" and size > 1:
            return add("concat", self.leaf("input", 1), self.state(size - 1))
        return add("add", self.state(size), self.leaf("input", size))

    def state(self, size: int) -> int:
        name = f"h{len(self.states)}"
        self.states.append((name, size))
        return self.builder.append("state", (), {"shape": [size]}, name)

    def row(self, index: int) -> int:
        """Return a value as a row, if it is a weight."""
        if self.builder.nodes[index].type.kind == "row":
            return index
        return self.builder.add("add", index, self.leaf("input", 1))

    def finished(self, result: int) -> Graph:
        """Add readers of a result, and new states that are inputs: numbers stay small."""
        add, draw = self.builder.add, self.draw
        outputs: dict[str, int] = {}
        kind = draw(st.sampled_from(["itself", "pointwise", "reduction", "next state", "nest"]))
        result = self.row(result)
        size = self.builder.size(result)
        output = result
        if kind == "pointwise":
            output = add("sub", result, self.leaf("input", size))
        elif kind == "reduction":
            output = add("amax", result)
        elif kind == "nest":
            output = add("gather", result, shape=[size], offset=size - 1, strides=[-1])
        elif kind == "next state":
            outputs[f"state.{(name := f'h{len(self.states)}')}"] = result
            output = self.builder.append("state", (), {"shape": [size]}, name)
        outputs["output"] = output
        for name, width in self.states:
            outputs[f"state.{name}"] = self.leaf("input", width)
        if not any(label.startswith("state.") for label in outputs):
            name, width = "last", 2
            self.builder.append("state", (), {"shape": [width]}, name)
            outputs[f"state.{name}"] = self.leaf("input", width)
        return self.builder.build(outputs)


def _attrs_of_line(draw: Draw) -> dict[str, Any]:
    outer, count, inner = draw(st.permutations(_extents(draw, 3)))
    return {"outer": outer, "count": count, "inner": inner}


def _nest(graphs: _Graphs, op: str) -> int:
    draw, add = graphs.draw, graphs.builder.add
    if op in ("view", "gather"):
        shape = _extents(draw, draw(st.integers(1, 4)))
        offset, strides, size = _access(draw, shape)
        return add(op, graphs.operand(size), shape=shape, offset=offset, strides=strides)
    if op == "interleave":
        outer, *parts = _extents(draw, 1, 9) + [draw(st.sampled_from(EXTENTS)) for _ in range(draw(st.integers(1, 3)))]
        return add(op, *[graphs.operand(outer * part, row=True) for part in parts], outer=outer)
    if op in ("reduce", "scan"):
        attrs = _attrs_of_line(draw)
        names = ["sum", "amax", "amin"] + (["argmax", "argmin"] if op == "reduce" else [])
        if attrs["count"] <= 19:
            names.append("prod")
        attrs["op"] = draw(st.sampled_from(names))
        if op == "scan":
            attrs["reverse"] = draw(st.booleans())
        return add(op, graphs.operand(attrs["outer"] * attrs["count"] * attrs["inner"]), **attrs)
    if op == "contract":
        return add(op, *_contraction(graphs, attrs := {}), **attrs)
    if op == "argsort":
        outer, count = draw(st.permutations(_extents(draw, 2, 200)))
        operand = graphs.operand(outer * count)
        few = {"first": draw(st.integers(1, count))} if draw(st.booleans()) else {}
        return add(op, operand, outer=outer, count=count, descending=draw(st.booleans()), **few)
    attrs = _attrs_of_line(draw)
    picks, kind = draw(st.sampled_from([1, 3, 16, 19])), draw(st.sampled_from(["shared", "each"]))
    if kind == "each" and attrs["outer"] * attrs["inner"] * picks > 4 * _MOST:
        kind = "shared"
    attrs |= {"picks": picks, "positions": kind}
    positions = graphs.operand(picks if kind == "shared" else attrs["outer"] * picks * attrs["inner"])
    if op == "take":
        return add(op, graphs.operand(attrs["outer"] * attrs["count"] * attrs["inner"]), positions, **attrs)
    return add(op, positions, graphs.operand(attrs["outer"] * picks * attrs["inner"]), **attrs)


def _contraction(graphs: _Graphs, attrs: dict[str, Any], *, row: bool = False) -> list[int]:
    """Draw the attributes and the operands of a contraction."""
    draw = graphs.draw
    axes, summed = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    extents = draw(st.permutations(_extents(draw, axes + summed, 2000)))
    attrs["shape"], attrs["count"] = extents[:axes], extents[axes:]
    operands = []
    for name in ("a", "b"):
        offset, strides, size = _access(draw, extents)
        attrs[name] = {"offset": offset, "strides": strides}
        operands.append(graphs.operand(size, row=row))
    return operands


@st.composite
def nests(draw: Draw, op: str) -> NestCase:
    """Draw a step around one nest."""
    graphs = _Graphs(draw)
    graph = graphs.finished(_nest(graphs, op))
    # Sums of large numbers are rounded; what only moves or sorts takes them as they are.
    odd = (*_ODD, 1e30) if op in ("view", "gather", "interleave", "take", "argsort") else _ODD
    return NestCase(
        graph, draw(st.sampled_from([1, 2, 7])), draw(st.integers(0, 999)), draw(st.sampled_from([(), odd]))
    )


@st.composite
def sums(draw: Draw, op: str) -> NestCase:
    """Draw a gradient whose weight's gradient is a nest summed over rows and steps."""
    graphs = _Graphs(draw)
    if op == "contract_sum":
        attrs: dict[str, Any] = {}
        operands = _contraction(graphs, attrs)
        shape = attrs["shape"]
        prefixes = [math.prod(shape[:axes]) for axes in range(len(shape) + 1)]
        lines = draw(st.sampled_from([0, *prefixes]))
        attrs["result"] = [lines, math.prod(shape) // lines] if lines else [math.prod(shape)]
    else:
        count, inner, picks = draw(st.permutations(_extents(draw, 3)))
        attrs = {"count": count, "inner": inner, "picks": picks}
        operands = [graphs.operand(picks), graphs.operand(picks * inner)]
    total = graphs.builder.add(op, *operands, **attrs)
    if draw(st.booleans()) and len(graphs.builder.nodes[total].type.shape) == 2:
        total = graphs.builder.add("transpose", total)
    if not graphs.states:
        graphs.state(2)
    outputs = {"grad.weight.w": total}
    outputs |= {f"state.{name}": graphs.leaf("input", width) for name, width in graphs.states}
    return NestCase(graphs.builder.build(outputs), draw(st.sampled_from([1, 2, 7])), draw(st.integers(0, 999)))


def values_of(case: NestCase) -> dict[str, Tensor]:
    """Return a value for each leaf: inputs (T, N, size), states (N, size), weights."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype = {"f32": torch.float32, "f64": torch.float64}[case.graph.dtype]
    values = {}
    for _, node in case.graph:
        lead = {"input": (STEPS, case.rows), "state": (case.rows,), "weight": ()}.get(node.op)
        if lead is None:
            continue
        value = torch.randint(-2, 3, (*lead, *node.type.shape), generator=generator).to(dtype)
        if case.uniform:
            value = torch.rand(value.shape, generator=generator, dtype=dtype) * 2 - 1
        if case.odd:
            which = torch.randint(0, 10 * len(case.odd), value.shape, generator=generator)
            odd = torch.tensor(case.odd, dtype=dtype)[which % len(case.odd)]
            value = torch.where(which < len(case.odd), odd, value)
        values[node.name] = value
    return values


def check(case: NestCase) -> None:
    """Compare a kernel's result with the interpreter's in double precision: they are equal."""
    values = {name: value.double() for name, value in values_of(case).items()}
    expected = _interpreted(case, values)
    actual = kernel_results(case)
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=0, equal_nan=True)


def kernel_results(case: NestCase) -> Tensor:
    """Return the output of a step, (T, N, size), or the gradient of a weight, by the kernel."""
    values, is_gradient = values_of(case), "output" not in case.graph.outputs
    kernel = compile_graph(case.graph, backward=is_gradient)
    inputs = [values[name] for name in kernel.slots.inputs]
    weights = [values[name] for name in kernel.slots.weights]
    state = [values[name] for name in kernel.plan.states]
    if not is_gradient:
        return run_all(kernel, tuple(weights), tuple(inputs), tuple(state), (), Options())[0]["output"]
    result = state[0].new_zeros(case.graph[case.graph.outputs["grad.weight.w"]].type.shape)
    block, last = kernel.block(), [value.new_empty(value.shape) for value in state]
    block.bind(inputs=inputs, weights=weights, first=state, last=last, outputs=(), sums=[result])
    run(kernel, block, STEPS, case.rows, False)
    return result


def _interpreted(case: NestCase, values: Mapping[str, Tensor]) -> Tensor:
    """Return the outputs of all steps, or the gradient summed over them."""
    graph = case.graph
    inputs = [graph[index].name for index in graph.leaves("input")]
    states = [graph[index].name for index in graph.leaves("state")]
    now, steps = dict(values), []
    for step in range(STEPS):
        results = interpret(graph, {**now, **{name: values[name][step] for name in inputs}})
        steps.append(results["output"] if "output" in results else results["grad.weight.w"])
        now |= {name: results[f"state.{name}"] for name in states}
    return torch.stack(steps) if "output" in graph.outputs else torch.stack(steps).sum(0)
