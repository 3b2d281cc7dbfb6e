"""``fusecell::scan``: a sequence as one operator, for torch.compile and torch.export.

The operator carries its step as the graph's text, so that an exported program holds all that it needs. What a trace
by torch sees of a layer is one call of it; the backward is another operator.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fusecell.cell import Cell
from fusecell.compiler.frontend import Traced, trace
from fusecell.compiler.frontend.guards import constants
from fusecell.compiler.frontend.weight_prologue import Prologue
from fusecell.compiler.ir.contract import check_graph
from fusecell.compiler.ir.graph import SAVED, Graph
from fusecell.compiler.program_registry import register_cache
from fusecell.compiler.programs.inference import run_forward, without_notes
from fusecell.compiler.programs.rebind import rebound
from fusecell.compiler.programs.training import Call, Training
from fusecell.compiler.refusal import Refusal, refusal
from fusecell.compiler.runtime.kernel import Kernel, compile_graph
from fusecell.compiler.transforms.partition import partition
from fusecell.eager import run_eager
from fusecell.errors import CompilerError, EagerWarning, quoted
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
        prologue: the number of the prologue that makes its weights of them; -1 where they are its weights.
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
    text, paths, prologue, values = _described(owner, leaf, features, inputs[0].dtype, wanted, recompute)
    if not text or not _usual((*inputs, *state)):
        if leaf >= 0:
            owner = owner.leaf_cells()[leaf][2]  # type: ignore[operator]  # a drop-in layer's method
        assert isinstance(owner, Cell)
        return run_eager(owner, inputs, state, options)
    for path, value in values:
        # torch guards what it sees read here. A NaN is not equal to itself.
        if _attribute(owner, path) != value and value == value:
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
        twin = rebound(cell, {path: _solid(value) for path, value in list(_tensors(cell))}, ())
        traced = trace(twin, features, dtype, gradients=wanted is not None)
        reasons = traced.reasons if isinstance(traced, Refusal) else _compiled(traced, twin, wanted, recompute)
        if isinstance(traced, Refusal) or reasons:
            warnings.warn(f"{type(cell).__name__} is unrolled: {' '.join(reasons)}", EagerWarning, stacklevel=2)
            return Described("", (), -1, ())
        prologue, values = traced.weights, () if leaf >= 0 else tuple(constants(cell))
        paths = prologue.direct_paths
        if paths is not None:
            return Described(traced.graph.text, tuple([path + suffix for path in paths]), -1, values)
        paths = [path + suffix for path, _ in prologue.sources]
        return Described(traced.graph.text, tuple(paths), _number_of(owner, prologue), values)


_HELD: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], int]] = WeakKeyDictionary()
"""Of each module that torch traces, the numbers of its prologues, each once: what torch has traced is the module's."""
_PROLOGUES: dict[int, Prologue] = {}
_NUMBERS = itertools.count()


def _number_of(owner: nn.Module, prologue: Prologue) -> int:
    """The number by which what torch traced of a module finds a prologue again, for as long as the module lives."""
    if owner not in _HELD:
        # Not through the table: by then it has lost the module.
        finalize(owner, _drop, _HELD.setdefault(owner, {}))
    numbers = _HELD[owner]
    key = (prologue.describe(), *[step.func for step in prologue.steps])
    if key not in numbers:
        numbers[key] = next(_NUMBERS)
        _PROLOGUES[numbers[key]] = prologue
    return numbers[key]


def _drop(numbers: dict[tuple[object, ...], int]) -> None:
    for number in numbers.values():
        del _PROLOGUES[number]


@torch._dynamo.allow_in_graph  # type: ignore[untyped-decorator]
def _computed(index: int, *originals: Tensor) -> State:
    """The weights that a step computes, as torch traces them."""
    return _PROLOGUES[index].computed(originals)


@register_cache
def _forget_kernels(kinds: Collection[type] | None = None) -> None:
    """Drop the kernels of all graphs: a graph doesn't say what cell it is of."""
    for kept in (_inference, _training, _output_size, _shapes):
        kept.cache_clear()


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


def _tensors(cell: Cell) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a cell by its path, those that are plain attributes too."""
    for prefix, module in cell.named_modules():
        start = prefix + "." if prefix else ""
        for table in (module._parameters, module._buffers, vars(module)):
            yield from ((start + name, value) for name, value in table.items() if isinstance(value, Tensor))


def _solid(value: Tensor) -> Tensor:
    """A tensor like one that may be fake, with memory; a step is traced for any values but those of kinks."""
    made = torch.zeros([int(size) for size in value.shape], dtype=value.dtype, device="cpu")
    if made.is_floating_point():
        made.copy_(torch.linspace(-0.7, 0.8, made.numel()).reshape(made.shape))
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
def _graph(text: str, gradients: bool) -> Graph:
    """The graph of a text, which may come from anywhere.

    Raises:
        ValueError: if it is none, or not one of the operator's.
    """
    try:
        graph = Graph.parse(text)
        check_graph(graph, "joint" if gradients else "step")
        _check_gradients(graph)
    except CompilerError as error:
        raise ValueError(f"fusecell::scan was given a graph that it can't run: {error}.") from error
    return graph


def _check_gradients(graph: Graph) -> None:
    """Whether there is nothing of what the compiler alone gives a graph."""
    names = [graph[index].name for index in graph.leaves("input")] + list(graph.outputs)
    saved = [name for name in names if name.startswith(SAVED)]
    if saved or not [name for name in names if not name.startswith("grad.")]:
        raise CompilerError(f"it has {quoted(saved)}, values that are kept for a backward")


@functools.lru_cache(256)
def _inference(text: str) -> Kernel:
    return compile_graph(without_notes(_graph(text, gradients=False)), about="fusecell::scan, without gradient")


@functools.lru_cache(256)
def _training(text: str, wanted: tuple[bool, ...], recompute: bool) -> Training:
    graph = _graph(text, gradients=True)
    inputs = _inputs(graph)
    weights = [graph[index].name for index in graph.leaves("weight")]
    labels = [f"grad.input.{name}" for name in inputs] + [f"grad.weight.{name}" for name in weights]
    if len(wanted) != len(labels):
        raise ValueError(f"fusecell::scan expected wanted to have {len(labels)} flags, got {len(wanted)}.")
    chosen = [label for label, flag in zip(labels, wanted, strict=True) if flag]
    return Training(inputs, weights, partition(graph, chosen, recompute=recompute), "fusecell::scan")


def _inputs(graph: Graph) -> list[str]:
    """The inputs that the operator is given; those of the backward come with the gradient."""
    inputs = [graph[index].name for index in graph.leaves("input")]
    return [name for name in inputs if not name.startswith("grad.")]


@functools.lru_cache(256)
def _output_size(text: str, gradients: bool) -> int:
    graph = _graph(text, gradients)
    return graph[graph.outputs["output"]].size


class _Shapes(NamedTuple):
    """What a graph reads, by name: features of inputs, sizes of states, shapes of weights; and the dtype."""

    inputs: dict[str, tuple[int, ...]]
    states: dict[str, tuple[int, ...]]
    weights: dict[str, tuple[int, ...]]
    dtype: torch.dtype


@functools.lru_cache(256)
def _shapes(text: str, gradients: bool) -> _Shapes:
    graph = _graph(text, gradients)
    shapes = {op: {graph[i].name: graph[i].type.shape for i in graph.leaves(op)} for op in ("input", "state", "weight")}
    inputs = {name: shapes["input"][name] for name in _inputs(graph)}
    dtype = torch.float32 if graph.dtype == "f32" else torch.float64
    return _Shapes(inputs, shapes["state"], shapes["weight"], dtype)


def _check(given: _Given) -> None:
    """Hold the tensors to what the graph reads: who calls the operator may have made both.

    Raises:
        ValueError: saying which does not fit, what was given and what is expected.
    """
    shapes = _shapes(given.graph, given.wanted is not None)
    for argument, values, names in (
        ("inputs", given.inputs, shapes.inputs),
        ("state", given.state, shapes.states),
        ("start", given.start, shapes.states if given.resets is not None else {}),
        ("weights", given.weights, shapes.weights),
    ):
        if len(values) != len(names):
            wanted = ", ".join(map(quoted, list(names)[:8])) or "none"
            raise _misfit(argument, f"to be {len(names)} tensors ({wanted})", str(len(values)))
        for name, value in zip(names, values, strict=True):
            _check_tensor(f"{argument} {quoted(name)}", value, shapes.dtype)
    for name, value in zip(shapes.inputs, given.inputs, strict=True):
        if value.dim() < 2 or 0 in value.shape:
            raise _misfit(f"inputs {quoted(name)}", "to be (T, N, ...), none of them 0", str(tuple(value.shape)))
    steps, rows = steps_of(tuple(given.inputs)), given.inputs[0].shape[1]
    for (name, size), value in zip(shapes.inputs.items(), given.inputs, strict=True):
        if value.shape[0] not in (1, steps) or value.shape[1] != rows or math.prod(value.shape[2:]) != size[0]:
            expected = f"of shape (1 or {steps}, {rows}, ...) with {size[0]} features"
            raise _misfit(f"inputs {quoted(name)}", expected, str(tuple(value.shape)))
    for argument, names, values in (("state", shapes.states, given.state), ("start", shapes.states, given.start)):
        for (name, size), value in zip(names.items(), values, strict=False):  # start is empty without resets
            _check_shape(f"{argument} {quoted(name)}", value, (rows, *size))
    for (name, shape), value in zip(shapes.weights.items(), given.weights, strict=True):
        _check_shape(f"weights {quoted(name)}", value, shape)
    if given.lengths is not None:
        _check_tensor("lengths", given.lengths, torch.int64)
        _check_shape("lengths", given.lengths, (rows,))
    if given.resets is not None:
        _check_tensor("resets", given.resets, torch.bool)
        _check_shape("resets", given.resets, (steps, rows))


def _check_tensor(name: str, value: Tensor, dtype: torch.dtype) -> None:
    if not value.is_cpu or value.layout is not torch.strided or value.dtype != dtype:
        got = f"{value.dtype} on {value.device}, {value.layout}"
        raise _misfit(name, f"to be a dense {dtype} on the CPU", got)


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise _misfit(name, f"of shape {shape}", str(tuple(value.shape)))


def _misfit(name: str, expected: str, got: str) -> ValueError:
    return ValueError(f"fusecell::scan expected {name} {expected}, as its graph reads it; got {got}.")


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
    made = [like.new_empty(steps, rows, _output_size(given.graph, given.wanted is not None))]
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
    if given.wanted is None:
        raise ValueError("fusecell::scan_backward expected wanted, a flag for each input and weight; got None.")
    steps, rows = steps_of(tuple(given.inputs)), given.inputs[0].shape[1]
    shapes = [(steps, rows, _output_size(given.graph, gradients=True)), *[tuple(value.shape) for value in given.state]]
    if len(grads) != len(shapes):
        raise _misfit("grads", f"to be {len(shapes)} tensors, of the output and each state", str(len(grads)))
    for place, (grad, shape) in enumerate(zip(grads, shapes, strict=True)):
        _check_tensor(f"grads[{place}]", grad, given.inputs[0].dtype)
        _check_shape(f"grads[{place}]", grad, shape)
    _check_tensor("saved", saved, given.inputs[0].dtype)
    _check_shape("saved", saved, (given.training().saved_size(steps * rows),))
    if not saved.is_contiguous():
        raise _misfit("saved", "as fusecell::scan has made it", f"one of stride {saved.stride()}")
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
