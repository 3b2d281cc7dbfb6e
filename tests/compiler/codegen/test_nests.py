"""Kernels of what is computed along axes: graphs against the interpreter, and cells against the Python loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import Tensor

import fusecell as fc
from fusecell.compiler.backend import llvm
from fusecell.compiler.backend.target import host_target
from fusecell.compiler.codegen import emit
from fusecell.compiler.ir.graph import Graph
from fusecell.compiler.programs import launch
from fusecell.compiler.runtime import guard_pages
from fusecell.compiler.schedule.scheduler import plan
from fusecell.compiler.transforms.passes import optimise
from tests.compiler import force_threads
from tests.compiler.axis_cells import AXES, AxisCell
from tests.compiler.cpu_levels import runs_here
from tests.compiler.nest_graphs import NESTS, SUMS, NestCase, check, kernel_results, nests, sums

SINGLE = ("a_weight_per_head", "matrices_of_a_row", "conv2d", "extremes_of_dim", "cumulative", "topk", "embedding")
LEVELS = [level for level in ("native", "x86-64-v3") if level == "native" or runs_here(level)]


@pytest.fixture(autouse=True)
def _guarded(request, monkeypatch):
    """Graphs run between guard pages, in scratch full of NaN, and without LLVM's optimiser, which takes long."""
    if "name" not in request.fixturenames:
        monkeypatch.setattr(guard_pages, "ENABLED", True)
        monkeypatch.setattr(llvm, "EFFORT", 0)
        monkeypatch.setenv("FUSECELL_CACHE", "off")  # where nobody should find such code


@pytest.mark.parametrize("op", [*NESTS, *SUMS])
@pytest.mark.parametrize("level", LEVELS)
def test_random_graphs_equal_the_interpreter(op, level, monkeypatch):
    monkeypatch.setenv("FUSECELL_TARGET", level)

    @seed(len(op) + len(level))
    @settings(
        max_examples=8, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(sums(op) if op in SUMS else nests(op))
    def each(case):
        check(case)

    each()


def _step(dtype: str, size: int, nest: str, result: int, *leaves: str) -> str:
    """Return the text of a step whose output is a nest of its input ``x``, whose state is another input."""
    return "\n".join([
        f"graph nest {dtype}",
        f'x = input() {{"shape": [{size}]}} : row[{size}]',
        *leaves,
        'h = state() {"shape": [2]} : row[2]',
        'h1 = input() {"shape": [2]} : row[2]',
        f"y = {nest} : row[{result}]",
        "return output = y",
        "return state.h = h1",
        "",
    ])  # fmt: skip


WEIGHT = 'w = weight() {"shape": [1]} : weight[1]'
ONE = '{"offset": 0, "strides": [1]}'
REGRESSIONS = {
    # Inputs of whole vectors are used in place, where nothing behind their rows may be read.
    "reduce in place": _step("f64", 480, 'reduce(x) {"count": 3, "inner": 5, "op": "amax", "outer": 32}', 160),
    "gather in place": _step("f32", 48, 'gather(x) {"offset": 0, "shape": [16, 3], "strides": [3, 1]}', 48),
    "scan in place": _step(
        "f32", 48, 'scan(x) {"count": 16, "inner": 3, "op": "sum", "outer": 1, "reverse": false}', 48
    ),
    "contract in place": _step(
        "f32", 48,
        'contract(x, x) {"a": {"offset": 0, "strides": [1, 3]}, "b": {"offset": 0, "strides": [1, 3]},'
        ' "count": [16], "shape": [3]}', 3,
    ),
    # Of eight positions some are those of the last elements.
    "take in place": _step(
        "f32", 48, 'take(x, w) {"count": 2, "inner": 3, "outer": 8, "picks": 8, "positions": "shared"}', 192,
        'w = weight() {"shape": [8]} : weight[8]',
    ),
    "scatter_add in place": _step(
        "f32", 48, 'scatter_add(w, x) {"count": 2, "inner": 3, "outer": 2, "picks": 8, "positions": "shared"}', 12,
        'w = weight() {"shape": [8]} : weight[8]',
    ),
    "interleave in place": _step("f32", 48, 'interleave(x, x) {"outer": 16}', 96),
    "argsort in place": _step("f32", 48, 'argsort(x) {"count": 3, "descending": false, "outer": 16}', 48),
    # Of one element, rows are the only axis.
    "one element": _step("f32", 1, f'contract(x, w) {{"a": {ONE}, "b": {ONE}, "count": [], "shape": [1]}}', 1, WEIGHT),
}  # fmt: skip
OF_SUMS = {
    "contract_sum in place": (
        'contract_sum(x, x) {"a": {"offset": 0, "strides": [3, 1]}, "b": {"offset": 0, "strides": [3, 0]}, "count": [],'
        ' "result": [16, 3], "shape": [16, 3]} : sum[16, 3]'
    ),
    "scatter_sum in place": ('scatter_sum(x, y) {"count": 7, "inner": 3, "picks": 48} : sum[7, 3]'),
}


@pytest.mark.parametrize("case", [*REGRESSIONS, *OF_SUMS])
def test_regressions(case):
    text = REGRESSIONS.get(case)
    if text is None:
        text = "\n".join([
            "graph sum f32", 'x = input() {"shape": [48]} : row[48]', 'y = input() {"shape": [144]} : row[144]',
            'h = state() {"shape": [2]} : row[2]', 'h1 = input() {"shape": [2]} : row[2]',
            f"total = {OF_SUMS[case]}", "return grad.weight.w = total", "return state.h = h1", "",
        ])  # fmt: skip
    for rows in (1, 4):
        check(NestCase(Graph.parse(text), rows, 0))


def test_lanes_behind_a_sum_add_nothing():
    """A sum of infinite products is infinite, also where both factors are one number for all terms."""
    accesses = '"a": {"offset": 0, "strides": [0, 0]}, "b": {"offset": 0, "strides": [0, 0]}'
    text = _step("f32", 100, f'contract(x, x) {{{accesses}, "count": [17], "shape": [1]}}', 1)
    cases = [NestCase(Graph.parse(text), 7, seed, odd=(float("inf"),)) for seed in range(3)]
    for case in cases:
        check(case)
    assert any(kernel_results(case).isinf().any() for case in cases)


@pytest.mark.parametrize("descending", ["true", "false"])
@pytest.mark.parametrize("count", [63, 64, 65, 79, 96])
def test_long_lines_are_sorted(count, descending):
    """Infinities, NaN and equal numbers among them; in place, where nothing behind them may be read, or not."""
    text = _step(
        "f32", 2 * count, f'argsort(x) {{"count": {count}, "descending": {descending}, "outer": 2}}', 2 * count
    )
    for odd in ((), (float("nan"), float("inf"), float("-inf"), 0.0, -0.0)):
        check(NestCase(Graph.parse(text), 4, 0, odd=odd))


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("descending", ["true", "false"])
@pytest.mark.parametrize(("count", "first"), [(3, 2), (15, 3), (16, 4), (17, 16), (64, 1), (79, 8), (512, 8)])
def test_the_first_few_are_selected(count, first, descending, dtype):
    """As a stable sort has them: of equal numbers and of equal infinities the first ones, NaN as the largest."""
    attrs = f'{{"count": {count}, "descending": {descending}, "first": {first}, "outer": 2}}'
    text = _step(dtype, 2 * count, f"argsort(x) {attrs}", 2 * first)
    inf = float("inf")
    for odd in ((), (0.0, -0.0, inf, -inf), (float("nan"), inf, -inf, 0.0, -0.0), (-inf,), (inf,), (float("nan"),)):
        for number in range(2):
            check(NestCase(Graph.parse(text), 4, number, odd=odd))


@pytest.mark.parametrize("count", [1, 15, 16, 17, 100])
def test_a_reduction_of_one_line_has_the_bits_of_the_sum_of_a_row(count):
    texts = [
        _step("f32", count, f'reduce(x) {{"count": {count}, "inner": 1, "op": "sum", "outer": 1}}', 1),
        _step("f32", count, "sum(x)", 1),
    ]
    reduced, summed = (kernel_results(NestCase(Graph.parse(text), 7, 0, uniform=True)) for text in texts)
    assert torch.equal(reduced, summed)


@pytest.mark.parametrize("op", ["contract", "reduce", "scatter_add", *SUMS])
def test_bits_do_not_depend_on_the_number_of_threads(op, monkeypatch):
    force_threads.always(monkeypatch)
    before, worked = torch.get_num_threads(), []
    run_team = launch.run_team
    monkeypatch.setattr(launch, "run_team", lambda *args: worked.append(run_team(*args)))

    @seed(0)
    @settings(
        max_examples=6, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(sums(op) if op in SUMS else nests(op))
    def each(case):
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            # Nine rows are divided among two threads; of fewer, threads share what is computed of each.
            results.append(kernel_results(NestCase(case.graph, case.rows + 2, case.seed, uniform=True)))
        assert torch.equal(*results)

    try:
        each()
    finally:
        torch.set_num_threads(before)
    assert worked


def test_the_length_of_the_text_does_not_depend_on_sizes():
    def lines(size: int) -> int:
        attrs = f'{{"a": {{"offset": 0, "strides": [{size}, 0, 1]}}, "b": {{"offset": 0, "strides": [0, {size}, 1]}}, '
        attrs += f'"count": [{size}], "shape": [{size}, {size}]}}'
        text = _step("f32", size * size, f"contract(x, x) {attrs}", size * size)
        return emit(plan(optimise(Graph.parse(text))[-1][1], backward=False), host_target()).text.count("\n")

    # Eight times as long on each of two axes. Where another tile is the cheaper one, a few lines differ.
    assert abs(lines(512) - lines(64)) <= lines(64) // 50


def _results(cell: fc.Cell, x: Tensor, h: Tensor, runner: str) -> list[Tensor]:
    """Outputs, states, and gradients of all that has one."""
    with fc.runner(runner):
        output, state = fc.Recurrent(cell)(x, h)
    loss = (output * torch.linspace(-1, 1, output.numel(), dtype=x.dtype).reshape(output.shape)).sum()
    leaves = [x, h, *cell.parameters()]
    gradients = torch.autograd.grad(loss + (state**2).sum(), leaves, allow_unused=True)
    zeros = [torch.zeros_like(leaf) for leaf in leaves]
    return [output, state, *(zero if each is None else each for each, zero in zip(gradients, zeros, strict=True))]


@pytest.mark.parametrize("name", AXES)
def test_kernels_along_axes(name: str) -> None:
    torch.manual_seed(0)
    cell = AxisCell(AXES[name]).double()
    sizes = [(3, torch.float64, 1e-11), (1, torch.float32, 2e-3)]
    # Single precision has its own vector width, and is otherwise the same text.
    for rows, dtype, tolerance in sizes if name in SINGLE else sizes[:1]:
        cell.to(dtype)
        x = torch.randn(4, rows, 5, dtype=dtype, requires_grad=True)
        h = torch.randn(rows, 24, dtype=dtype, requires_grad=True)
        compiled, eager = (_results(cell, x, h, runner) for runner in ("compiled", "eager"))
        for actual, expected in zip(compiled, eager, strict=True):
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
