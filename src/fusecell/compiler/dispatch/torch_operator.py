"""``fusecell::scan``: a sequence as one operator, for torch.compile and torch.export.

The operator carries its step as the graph's text, so that an exported program holds all that it needs. What a trace
by torch sees of a layer is one call of it; the backward is another operator.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fusecell.cell import Cell
from fusecell.compiler.frontend import Traced, trace
from fusecell.compiler.frontend.weight_prologue import Prologue
from fusecell.compiler.ir.graph import Graph
from fusecell.compiler.programs.inference import run_forward, without_notes
from fusecell.compiler.programs.rebind import bound
from fusecell.compiler.programs.training import Call, Training
from fusecell.compiler.refusal import Refusal, refusal
from fusecell.compiler.runtime.kernel import Kernel, compile_graph
from fusecell.compiler.transforms.partition import partition
from fusecell.eager import run_eager
from fusecell.errors import CompilerError, EagerWarning
from fusecell.execution.context import recomputing
from fusecell.execution.options import Options, State, steps_of
from fusecell.execution.runners import register
from fusecell.validation import first_state

__all__ = ["run_traced"]


Constants = tuple[tuple[str, object], ...]


class Described(NamedTuple):
    """A cell's step as the operator takes it; plain values, so that torch takes them for constants.

    Arguments:
        text: the graph, with its gradient if that is wanted; empty where the step can't be compiled.
        paths: the tensors that it takes, by the paths of their attributes.
        prologue: which of the prologues makes its weights of them; -1 where they are its weights.
        constants: numbers, flags and names that the step may have read, by path; torch traces again if one changes.
    """

    text: str
    paths: tuple[str, ...]
    prologue: int
    constants: Constants


def run_traced(owner: nn.Module, inputs: State, state: State, options: Options, leaf: int = -1) -> tuple[Tensor, State]:
    """Run a cell while torch traces it: one operator, or a loop that torch unrolls where the cell can't be compiled.

    Arguments:
        owner: the cell, or a drop-in layer.
        leaf: which of the layer's cells.
    """
    wanted = tuple([value.requires_grad for value in inputs]) if torch.is_grad_enabled() else None
    # A list has a length that is a number, whatever torch has made of the size.
    features = tuple([tuple([len([0] * size) for size in value.shape[2:]]) for value in inputs])
    recompute = options.recompute or recomputing()
    text, paths, prologue, constants = _described(owner, leaf, features, inputs[0].dtype, wanted, recompute)
    if not text or not _usual((*inputs, *state)):
        if leaf >= 0:
            owner = owner.leaf_cells()[leaf][2]  # type: ignore[operator]  # a drop-in layer's method
        assert isinstance(owner, Cell)
        return run_eager(owner, inputs, state, options)
    for path, value in constants:
        if _attribute(owner, path) != value:
            raise CompilerError(f"{path} has changed while torch traced {type(owner).__name__}")
    weights: State = tuple([_attribute(owner, path) for path in paths])
    if prologue >= 0:
        weights = _computed(prologue, *weights)
    start: State = ()
    if options.resets is not None:
        start = tuple([torch.zeros_like(value) for value in state])
        if isinstance(owner, Cell):
            start = first_state(owner, inputs[0].shape[1], dtype=inputs[0].dtype, device=inputs[0].device)
    flags = None if wanted is None else [*wanted, *[value.requires_grad for value in weights]]
    outputs, *after = _scan(
        text, list(inputs), list(state), list(start), list(weights), options.lengths, options.resets,
        options.reverse, recompute, flags,
    )  # fmt: skip
    return outputs, tuple(after[: len(state)])


def _usual(tensors: State) -> bool:
    first = tensors[0]
    return all(value.device.type == "cpu" and value.dtype == first.dtype and 0 not in value.shape for value in tensors)


def _attribute(owner: Any, path: str) -> Any:
    for name in path.split("."):
        owner = getattr(owner, name)
    return owner


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _described(
    owner: nn.Module,
    leaf: int,
    features: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    wanted: Sequence[bool] | None,
    recompute: bool,
) -> Described:
    """What torch takes for a constant of its trace: it runs this as it is, on the module itself.

    In an export the weights are fake, so the step is traced with others of their shapes.
    """
    with _disable_current_modes(), torch.enable_grad():
        suffix, cell = "", owner
        if leaf >= 0:
            layer, direction, cell = owner.leaf_cells()[leaf]  # type: ignore[operator]  # a drop-in layer's method
            suffix = f"_l{layer}_reverse" if direction else f"_l{layer}"
        assert isinstance(cell, Cell)
        twin = bound(cell, {path: _solid(value) for path, value in list(_tensors(cell))}, ())
        traced = trace(twin, features, dtype, gradients=wanted is not None)
        reasons = traced.reasons if isinstance(traced, Refusal) else _compiled(traced, twin, wanted, recompute)
        if isinstance(traced, Refusal) or reasons:
            warnings.warn(f"{type(cell).__name__} is unrolled: {' '.join(reasons)}", EagerWarning, stacklevel=2)
            return Described("", (), -1, ())
        prologue = traced.weights
        paths = prologue.direct_paths
        if paths is not None:
            return Described(traced.graph.text, tuple([path + suffix for path in paths]), -1, _constants(cell, leaf))
        _PROLOGUES.append(prologue)
        paths = [path + suffix for path, _ in prologue.sources]
        return Described(traced.graph.text, tuple(paths), len(_PROLOGUES) - 1, _constants(cell, leaf))


_PROLOGUES: list[Prologue] = []


@torch._dynamo.allow_in_graph  # type: ignore[untyped-decorator]
def _computed(index: int, *originals: Tensor) -> State:
    """The weights that a step computes, as torch traces them."""
    return _PROLOGUES[index].computed(originals)


def _compiled(traced: Traced, cell: Cell, wanted: Sequence[bool] | None, recompute: bool) -> tuple[str, ...]:
    """Compile the kernels, so that a defect of ours shows now; the reasons where there is one."""
    try:
        if wanted is None:
            _inference(traced.graph.text)
        else:
            flags = [value.requires_grad for value in traced.weights.values(cell)]
            _training(traced.graph.text, (*wanted, *flags), recompute)
    except (CompilerError, AssertionError, LookupError) as error:
        return refusal(error).reasons
    return ()


def _constants(cell: Cell, leaf: int) -> Constants:
    if leaf >= 0:
        return ()
    found: list[tuple[str, object]] = []
    for prefix, module in cell.named_modules():
        start = prefix + "." if prefix else ""
        for name, value in vars(module).items():
            if isinstance(value, bool | int | float | str) and not name.startswith("_"):
                found.append((start + name, value))
    return tuple(found)


def _tensors(cell: Cell) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a cell by its path, those that are plain attributes too."""
    for prefix, module in cell.named_modules():
        start = prefix + "." if prefix else ""
        for table in (module._parameters, module._buffers, vars(module)):
            yield from ((start + name, value) for name, value in table.items() if isinstance(value, Tensor))


def _solid(value: Tensor) -> Tensor:
    """A tensor like one that may be fake, with memory; a step is traced for any values."""
    made = torch.zeros([int(size) for size in value.shape], dtype=value.dtype, device="cpu")
    return nn.Parameter(made, requires_grad=value.requires_grad) if made.is_floating_point() else made


class _Given(NamedTuple):
    """What both operators take, in this order; ``wanted`` is None where there is no gradient."""

    graph: str
    inputs: list[Tensor]
    state: list[Tensor]
    start: list[Tensor]
    weights: list[Tensor]
    lengths: Tensor | None
    resets: Tensor | None
    reverse: bool
    recompute: bool
    wanted: list[bool] | None

    @property
    def tensors(self) -> State:
        return (*self.inputs, *self.state, *self.start, *self.weights)

    @property
    def options(self) -> Options:
        return Options(self.lengths, self.resets, self.reverse, self.recompute)

    def training(self) -> Training:
        return _training(self.graph, tuple(self.wanted or ()), self.recompute)

    def call(self) -> Call:
        inputs, state, start, weights = map(tuple, (self.inputs, self.state, self.start, self.weights))
        call = Call.of(self.training(), inputs, state, start, weights, self.options)
        # As much memory as torch, which does not know the lengths, has been told.
        call.all_rows = call.steps * call.rows
        return call

    def due(self) -> list[bool]:
        """For each tensor, whether the backward makes its gradient."""
        wanted, count = self.wanted or [], len(self.inputs)
        states = [True] * (len(self.state) + len(self.start))
        return [*wanted[:count], *states, *wanted[count:]]


_SCHEMA = (
    "str graph, Tensor[] inputs, Tensor[] state, Tensor[] start, Tensor[] weights, Tensor? lengths, Tensor? resets, "
    "bool reverse, bool recompute, bool[]? wanted"
)


@functools.lru_cache(256)
def _inference(text: str) -> Kernel:
    return compile_graph(without_notes(Graph.parse(text)), about="fusecell::scan, without gradient")


@functools.lru_cache(256)
def _training(text: str, wanted: tuple[bool, ...], recompute: bool) -> Training:
    graph = Graph.parse(text)
    inputs = [graph[index].name for index in graph.leaves("input")]
    inputs = [name for name in inputs if not name.startswith("grad.")]
    weights = [graph[index].name for index in graph.leaves("weight")]
    labels = [f"grad.input.{name}" for name in inputs] + [f"grad.weight.{name}" for name in weights]
    chosen = [label for label, flag in zip(labels, wanted, strict=True) if flag]
    return Training(inputs, weights, partition(graph, chosen, recompute=recompute), "fusecell::scan")


@functools.lru_cache(256)
def _output_size(text: str) -> int:
    graph = Graph.parse(text)
    return graph[graph.outputs["output"]].size


@functools.lru_cache(256)
def _shapes(text: str) -> tuple[list[int], list[int], list[tuple[int, ...]], torch.dtype]:
    """What a graph reads: the features of each input, the sizes of states, the shapes of weights; and the dtype."""
    graph = Graph.parse(text)
    inputs = [graph[index].size for index in graph.leaves("input") if not graph[index].name.startswith("grad.")]
    states = [graph[index].size for index in graph.leaves("state")]
    weights = [tuple(graph[index].type.shape) for index in graph.leaves("weight")]
    return inputs, states, weights, torch.float32 if graph.dtype == "f32" else torch.float64


def _check(given: _Given) -> None:
    """Raise ValueError unless the tensors are what the graph reads: who calls the operator may have made both."""
    inputs, states, weights, dtype = _shapes(given.graph)
    steps, rows = steps_of(tuple(given.inputs)), given.inputs[0].shape[1]
    found = [(value.shape[0] in (1, steps), value.shape[1], value[:1, :1].numel()) for value in given.inputs]
    fits = found == [(True, rows, size) for size in inputs]
    fits = fits and [tuple(value.shape) for value in given.weights] == weights
    shapes = [(rows, size) for size in states]
    fits = fits and [tuple(value.shape) for value in given.state] == shapes
    fits = fits and [tuple(value.shape) for value in given.start] == (shapes if given.resets is not None else [])
    fits = fits and all(value.is_cpu and value.dtype == dtype for value in given.tensors)
    lengths, resets = given.lengths, given.resets
    fits = fits and (lengths is None or (lengths.shape == (rows,) and lengths.dtype == torch.int64))
    fits = fits and (resets is None or (resets.shape == (steps, rows) and resets.dtype == torch.bool))
    if not fits:
        raise ValueError("fusecell::scan was given tensors that are not what its graph reads.")


@torch.library.custom_op("fusecell::scan", mutates_args=(), device_types="cpu", schema=f"({_SCHEMA}) -> Tensor[]")
def _scan(*args: Any) -> list[Tensor]:
    """The outputs, the states after the last step and, with gradients, what the backward needs."""
    given = _Given(*args)
    _check(given)
    if given.wanted is None:
        inputs, state, start, weights = map(tuple, (given.inputs, given.state, given.start, given.weights))
        outputs, after = run_forward(_inference(given.graph), weights, inputs, state, start, given.options)
        return [outputs, *after]
    saved, outputs, after = given.call().forward(given.tensors)
    return [outputs, *after, saved]


@_scan.register_fake
def _(*args: Any) -> list[Tensor]:
    given, like = _Given(*args), args[1][0]
    steps, rows = steps_of(tuple(given.inputs)), like.shape[1]
    made = [like.new_empty(steps, rows, _output_size(given.graph))]
    made += [value.new_empty(value.shape) for value in given.state]
    if given.wanted is not None:
        made.append(like.new_empty(given.training().saved_size(steps * rows)))
    return made


@torch.library.custom_op(
    "fusecell::scan_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor saved, Tensor[] grads, {_SCHEMA}) -> Tensor[]",
)
def _scan_backward(saved: Tensor, grads: list[Tensor], *args: Any) -> list[Tensor]:
    """The gradients of the states, of what resets go back to, and of the inputs and weights that want one."""
    given = _Given(*args)
    _check(given)
    steps, rows = steps_of(tuple(given.inputs)), given.inputs[0].shape[1]
    made = [(steps, rows, _output_size(given.graph)), *[tuple(value.shape) for value in given.state]]
    least = given.training().saved_size(steps * rows)
    if [tuple(grad.shape) for grad in grads] != made or saved.shape != (least,) or saved.dtype != grads[0].dtype:
        raise ValueError("fusecell::scan_backward was given what another fusecell::scan has made.")
    if saved.data_ptr() % 64:  # moved since: the forward began at a multiple
        saved = saved.clone()
    found = given.call().gradients(saved, given.tensors, grads)
    pairs = zip(found, given.tensors, given.due(), strict=True)
    return [torch.zeros_like(value) if grad is None else grad for grad, value, due in pairs if due]


@_scan_backward.register_fake
def _(saved: Tensor, grads: list[Tensor], *args: Any) -> list[Tensor]:
    given = _Given(*args)
    return [value.new_empty(value.shape) for value, due in zip(given.tensors, given.due(), strict=True) if due]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    given = _Given(*inputs)
    ctx.counts = [len(values) for values in (given.inputs, given.state, given.start, given.weights)]
    ctx.constants = given.graph, given.reverse, given.recompute, given.wanted
    if given.wanted is not None:
        ctx.save_for_backward(output[-1], *given.tensors, given.lengths, given.resets)


def _gradient(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    saved, *tensors, lengths, resets = ctx.saved_tensors
    graph, reverse, recompute, wanted = ctx.constants
    given = _Given(graph, *_parts(tensors, ctx.counts), lengths, resets, reverse, recompute, wanted)
    made = iter(_scan_backward(saved, list(grads[:-1]), *given))
    found = [next(made) if due else None for due in given.due()]
    return (None, *_parts(found, ctx.counts), *[None] * 5)


def _parts(values: list[Any], counts: Sequence[int]) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    rest = iter(values)
    inputs, state, start, weights = ([next(rest) for _ in range(count)] for count in counts)
    return inputs, state, start, weights


_scan.register_autograd(_gradient, setup_context=_keep)
register("traced", run_traced)
