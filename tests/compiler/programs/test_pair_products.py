"""Products of bfloat16 layers by pairs: where the CPU has the instruction, against float64 and against themselves."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fusecell as fc
from fusecell.compiler.backend import llvm
from fusecell.compiler.backend.target import host_target, target_of
from fusecell.compiler.codegen import emit
from fusecell.compiler.dispatch.runner import find_program
from fusecell.compiler.frontend import trace
from fusecell.compiler.ir.graph import Graph
from fusecell.compiler.ir.graph_contract import check_graph
from fusecell.compiler.ir.interpreter import interpret
from fusecell.compiler.programs.inference import run_forward, without_notes
from fusecell.compiler.refusal import Refusal
from fusecell.compiler.runtime.kernel import schedule
from fusecell.compiler.transforms.passes import optimise
from fusecell.errors import CompilerError
from fusecell.execution.options import Options
from fusecell.exporting.targets import TARGETS, target_named
from tests.compiler import force_threads
from tests.compiler.tuned import tuned

_TRIPLE = "x86_64-unknown-linux-gnu"
_LEVEL = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
WITH_PAIRS, WITHOUT = (
    target_of(cpu, ",".join(f"+{name}" for name in features), _TRIPLE, frozenset(features))
    for cpu, features in (("znver4", (*_LEVEL, "avx512bf16")), ("x86-64-v4", _LEVEL))
)
by_pairs = pytest.mark.skipif(host_target().pair_dot is None, reason="this CPU multiplies no pairs of bfloat16 numbers")
KINDS = {"RNN": fc.RNNCell, "GRU": fc.GRUCell, "LSTM": fc.LSTMCell}
every_kind = pytest.mark.parametrize("kind", KINDS)


def graph_of(cell: fc.Cell, features: int, dtype: torch.dtype = torch.bfloat16) -> Graph:
    traced = trace(cell, [(features,)], dtype, gradients=False)
    assert not isinstance(traced, Refusal)
    return without_notes(traced.graph)


def text_for(graph: Graph, target) -> str:
    return emit(schedule(graph, pairs=target.pair_dot is not None), target).text


@every_kind
def test_only_targets_with_the_instruction_take_it(kind):
    graph = graph_of(KINDS[kind](7, 9).bfloat16(), 7)
    intrinsic = WITH_PAIRS.pair_dot.intrinsic
    assert intrinsic in text_for(graph, WITH_PAIRS)
    without = text_for(graph, WITHOUT)
    assert "bfloat" not in without
    # Nothing of a float32 layer, or a float16 one, is another for such a CPU than for one without.
    wide = graph_of(KINDS[kind](7, 9), 7, torch.float32)
    assert without == text_for(wide, WITHOUT)
    for dtype in (torch.float32, torch.float16):
        assert intrinsic not in text_for(graph_of(KINDS[kind](7, 9).to(dtype), 7, dtype), WITH_PAIRS)


def test_levels_that_can_be_asked_for_have_none():
    """So that FUSECELL_TARGET holds any CPU to the bits of those without."""
    for level in host_target().isa.levels:
        features = host_target().isa.features_of(level)
        assert target_of(level, "", host_target().triple, frozenset(features)).pair_dot is None
    assert all(target_named(target).machine.pair_dot is None for target in TARGETS), "exports run on any such CPU"


@every_kind
def test_machine_code(kind):
    """A pair dot reads each of its accumulators from a register: no spills in the innermost loops."""
    text = text_for(graph_of(KINDS[kind](64, 128).bfloat16(), 64), WITH_PAIRS)
    code = llvm.assembly(text, ["run", "team"], WITH_PAIRS.cpu, WITH_PAIRS.features, _TRIPLE)
    lines = [line for line in code.splitlines() if "vdpbf16ps" in line]
    assert lines
    assert all("rsp" not in line for line in lines)
    assert "vcvtneps2bf16" in code


def test_what_a_pass_rounds():
    """What weights of bfloat16 numbers multiply, once for all products of it; no product over a single feature."""
    for features, count in ((7, 2), (1, 1)):
        graph = optimise(graph_of(fc.GRUCell(features, 9).bfloat16(), features), pairs=True)[-1][1]
        rounded = [graph[node.args[0]].name for node in graph.nodes if node.op == "to_bfloat16"]
        assert rounded == ["x", "h"][-count:]
        stored = [node.attrs.get("stored") for node in graph.nodes if node.op == "weight" and len(node.type.shape) > 1]
        assert stored.count("bf16.bf16") == count


def test_pairs_are_the_compilers_choice_alone():
    graph = optimise(graph_of(fc.GRUCell(7, 9).bfloat16(), 7), pairs=True)[-1][1]
    with pytest.raises(CompilerError, match="the compiler alone decides"):
        check_graph(Graph.parse(graph.text), "step")
    with pytest.raises(CompilerError, match="the numbers of a weight are bf16"):
        Graph.parse(graph.text.replace('"numbers": "bf16"', '"numbers": "f16"'))


def run_step(cell: fc.Cell, x: Tensor, state: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the output and the new states of one step, as float32 numbers that nothing has rounded yet."""
    program = find_program(cell, (x,))
    assert not isinstance(program, Refusal)
    weights = program.traced.weights.values(cell)
    wide = tuple(value.float() for value in state)
    outputs, after = run_forward(program.kernel, weights, (x.float(),), wide, (), Options())
    return [outputs[0], *after]


SIZES = [(5, 9), (1, 7), (2, 2), (3, 1), (17, 33), (16, 32), (64, 48), (257, 10)]


@by_pairs
@every_kind
@pytest.mark.parametrize(("inputs", "units"), SIZES)
def test_a_step_against_float64(kind, inputs, units):
    """Of numbers that bfloat16 has, pairs of products are as exact as float32's, whatever is odd."""
    cell = KINDS[kind](inputs, units).bfloat16()
    exact = copy.deepcopy(cell).double()
    for rows in (*range(1, 10), 31):
        x = torch.randn(1, rows, inputs).bfloat16()
        state = tuple(torch.randn(rows, units).bfloat16() for _ in cell.states)
        with torch.no_grad():
            actual = run_step(cell, x, state)
            output, after = exact.step(x[0].double(), tuple(value.double() for value in state))
        for value, truth in zip(actual, [output, *after], strict=True):
            torch.testing.assert_close(value.double(), truth, rtol=2e-5, atol=2e-6)


class Mixed(fc.Cell):
    """Products by weights of two formats in one sum, by a part of a weight, by a weight that is computed, and of 1 / h.

    Behind an odd number of features 1 / h is infinite in a kernel's memory.
    """

    def __init__(self) -> None:
        super().__init__(11, 13)
        self.inp, self.wide = nn.Linear(11, 13, dtype=torch.bfloat16), nn.Parameter(torch.randn(13, 13))
        self.rec = nn.Parameter(torch.randn(13, 20).bfloat16() / 4)

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        (h,) = state
        exact = (h.float() @ self.wide).to(h.dtype)
        skew = (1 / (h.abs() + 0.5)) @ (self.rec[:, 7:] - self.rec[:, 7:].t())
        h = torch.tanh(self.inp(x) + h @ self.rec[:, :13] + skew + exact) + 0.25 * x[:, :1]
        return h, (h,)


@by_pairs
def test_a_cell_with_weights_of_two_formats():
    cell, x = Mixed(), torch.randn(9, 5, 11).bfloat16()
    graph = optimise(graph_of(cell, 11), pairs=True)[-1][1]
    stored = {node.name: node.attrs.get("stored") for node in graph.nodes if node.op == "weight"}
    assert stored["wide"] is None
    assert list(stored.values()).count("bf16.bf16") == 3
    values = dict(zip([graph[leaf].name for leaf in graph.leaves("weight")], weights_of(cell, x), strict=True))
    values = {name: value.double() for name, value in values.items()}
    h = torch.randn(5, 13).bfloat16()
    with torch.no_grad():
        (actual, _) = run_step(cell, x[:1], (h,))
    truth = interpret(graph, {**values, "x": x[0].double(), "h": h.double()})["output"]
    assert actual.isfinite().all()
    # What is rounded in the step, 1 / (|h| + 0.5), may fall to either side: one place of bfloat16 of one operand.
    torch.testing.assert_close(actual.double(), truth, rtol=1e-2, atol=1e-2)
    assert float((actual.double() - truth).abs().median().detach()) < 1e-6


def weights_of(cell: fc.Cell, x: Tensor) -> tuple[Tensor, ...]:
    program = find_program(cell, (x,))
    assert not isinstance(program, Refusal)
    return program.traced.weights.values(cell)


@by_pairs
@every_kind
def test_bits_do_not_depend_on_batch_chunks_or_layout(kind, monkeypatch):
    layer, x = fc.Recurrent(KINDS[kind](19, 41)).bfloat16(), torch.randn(9, 13, 19).bfloat16()
    with fc.runner("compiled"), torch.no_grad():
        y, _ = layer(x)
        for rows in range(1, 10):
            assert torch.equal(layer(x[:, :rows].contiguous())[0], y[:, :rows])
            assert torch.equal(layer(x[:, rows : rows + 1])[0], y[:, rows : rows + 1])
        assert torch.equal(layer(x.transpose(0, 1).contiguous().transpose(0, 1))[0], y)
        assert torch.equal(layer(x, lengths=[9] * 13)[0], y)
        tuned(monkeypatch, chunk_bytes=1)
        assert torch.equal(layer(x)[0], y)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    outputs, _ = layer(x)
    grads = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(5)).bfloat16()
    outputs.backward(grads.to(outputs.dtype))
    return [outputs.detach(), x.grad, *[parameter.grad for parameter in layer.parameters()]]


@by_pairs
@every_kind
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_bits_do_not_depend_on_threads_or_chunks(kind, rows, threads, monkeypatch):
    """With few rows threads share the columns, with many the rows; outputs and all gradients."""
    layer, x = fc.Recurrent(KINDS[kind](19, 41)).bfloat16(), torch.randn(9, rows, 19).bfloat16()
    torch.set_num_threads(1)
    with fc.runner("compiled"):
        expected = gradients(layer, x)
        force_threads.always(monkeypatch)
        for count in (1, 2):
            torch.set_num_threads(count)
            for _ in range(3):
                assert all(map(torch.equal, gradients(layer, x), expected))
        tuned(monkeypatch, chunk_bytes=1)
        assert all(map(torch.equal, gradients(layer, x), expected))


def rms(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).square().mean().sqrt() / truth.double().square().mean().sqrt())


@by_pairs
@every_kind
@pytest.mark.parametrize(("steps", "rows", "inputs", "units"), [(100, 8, 64, 128), (35, 7, 33, 65)])
def test_long_sequences_are_nearer_to_float64_than_torchs(kind, steps, rows, inputs, units):
    """Outputs and every gradient; rounding exact results once leaves 1.7e-3."""
    reference = getattr(nn, kind)(inputs, units).bfloat16()
    layer = getattr(fc, kind)(inputs, units).bfloat16()
    layer.load_state_dict(reference.state_dict())
    x = torch.randn(steps, rows, inputs).bfloat16()
    truths = gradients(copy.deepcopy(reference).double(), x.double())
    with fc.runner("compiled"):
        actual = gradients(layer, x)
    for value, torch_value, truth in zip(actual, gradients(reference, x), truths, strict=True):
        # Where both are exact but for the rounding of results, the errors of two roundings differ by chance.
        assert rms(value, truth) <= rms(torch_value, truth) + torch.finfo(torch.bfloat16).eps / 8
        assert rms(value, truth) <= 6e-3


@by_pairs
def test_explain_says_which_products_take_pairs():
    text = str(fc.explain(fc.GRU(19, 33).bfloat16()))
    assert "by pairs of bfloat16 numbers" in text
    assert "by pairs" not in str(fc.explain(fc.GRU(19, 33)))


class Dense(fc.Cell):
    """The output and the state are products of bfloat16 weights, and nothing is rounded between them and a gradient."""

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__(inputs, units)
        self.weight = nn.Parameter(torch.randint(-2, 3, (units, inputs)).bfloat16())

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return x @ self.weight.t(), state


@by_pairs
@pytest.mark.parametrize(("inputs", "units"), [(1, 1), (3, 2), (7, 17), (16, 40), (129, 50)])
def test_sums_of_whole_numbers_are_exact(inputs, units):
    """Whatever is odd: rows, steps, features; by steps in reverse, of sequences that end, in the caller's order."""
    layer = fc.Recurrent(Dense(inputs, units), batch_first=True)
    assert "outer.pairs" in fc.explain(layer).cells[0].backward.llvm
    for rows, steps in ((1, 1), (3, 1), (2, 5), (5, 7), (37, 9), (8, 131)):
        x, slope = (torch.randint(-8, 9, (rows, steps, size)).bfloat16() for size in (inputs, units))
        lengths = torch.randint(1, steps + 1, (rows,))
        for options in ({}, {"lengths": lengths}):
            layer.zero_grad()
            with fc.runner("compiled"):
                layer(x, **options)[0].backward(slope)
            exact = slope.double()
            if options:
                exact = exact * (torch.arange(steps)[:, None] < lengths).T[..., None]
            truth = exact.flatten(0, 1).T @ x.double().flatten(0, 1)
            assert torch.equal(layer.cell.weight.grad, truth.bfloat16())


@by_pairs
def test_machine_code_of_sums():
    """No accumulator is spilled in the innermost loops."""
    backward = fc.explain(fc.LSTM(64, 128).bfloat16()).cells[0].backward
    code = llvm.assembly(backward.llvm, ["run", "team"], host_target().cpu, host_target().features, _TRIPLE)
    lines = [line for line in code.splitlines() if "vdpbf16ps" in line]
    assert len(lines) > 100
    assert all("rsp" not in line for line in lines)


@by_pairs
@pytest.mark.parametrize("steps", [4, 7, 150])
def test_a_sum_has_the_bits_of_rounded_numbers_added_row_by_row(steps):
    """The instruction adds two products one after the other: small ones are lost next to large ones that cancel."""
    layer = fc.Recurrent(Dense(3, 19))
    large = 2.0**13
    x = torch.tensor([large, -large, 1, 0])[torch.randint(4, (steps, 1, 3))]
    slope = torch.where(x[..., :1].abs() == large, large, torch.randint(-3, 4, (steps, 1, 19)))
    with fc.runner("compiled"):
        layer(x.bfloat16())[0].backward(slope.bfloat16())
    sums = torch.zeros(19, 3)
    for number, other in zip(slope[:, 0].flip(0), x[:, 0].flip(0), strict=True):  # steps run backwards
        sums += number[:, None] * other
    exact = slope[:, 0].double().T @ x[:, 0].double()
    assert torch.equal(layer.cell.weight.grad, sums.bfloat16())
    assert steps < 100 or not torch.equal(sums.double(), exact)
