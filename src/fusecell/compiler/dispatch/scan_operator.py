"""The operator ``fusecell::scan`` and its backward: a sequence of steps as one node of torch's graphs.

The operator takes its step as the graph's text, so that an exported program contains all that it needs. Text and
tensors may come from anywhere, so that they are checked against one another before a kernel runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fusecell.compiler.cache_registry import register_cache
from fusecell.compiler.ir.graph import SAVED, Graph
from fusecell.compiler.ir.graph_contract import check_graph
from fusecell.compiler.programs.inference import run_forward, without_notes
from fusecell.compiler.programs.training import Call, Training
from fusecell.compiler.runtime.kernel import Kernel, compile_graph
from fusecell.compiler.transforms.partition import partition
from fusecell.errors import CompilerError, quoted
from fusecell.execution.options import Options, State, steps_of

__all__ = ["ScanArguments", "inference_kernel", "not_empty", "scan", "scan_backward", "training_kernels"]


class ScanArguments(NamedTuple):
    """The arguments of both operators, in order; their names are the schema's, which exported programs contain.

    Arguments:
        graph: the text of the step's graph.
        start: the states that resets go back to.
        wanted: for each input and weight whether it needs a gradient; None for a call without gradients.
    """

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

    @classmethod
    def of(cls, args: Sequence[Any]) -> ScanArguments:
        """Take the operator's arguments, with an empty list for each that :func:`not_empty` stands for."""
        arguments = cls(*args)
        state, start, weights = map(_present, (arguments.state, arguments.start, arguments.weights))
        return arguments._replace(state=state, start=start, weights=weights)

    @property
    def tensors(self) -> State:
        return (*self.inputs, *self.state, *self.start, *self.weights)

    @property
    def options(self) -> Options:
        return Options(self.lengths, self.resets, self.reverse, self.recompute)

    def training(self) -> Training:
        return training_kernels(self.graph, tuple(self.wanted or ()), self.recompute)

    def call(self) -> Call:
        inputs, state, start, weights = map(tuple, (self.inputs, self.state, self.start, self.weights))
        call = Call.of(self.training(), inputs, state, start, weights, self.options)
        # torch, which does not know the lengths, was told the size of what is saved without them.
        call.all_rows = call.steps * call.rows
        return call

    def has_gradient(self) -> list[bool]:
        """Return for each tensor whether the backward computes its gradient."""
        wanted, count = self.wanted or [], len(self.inputs)
        states = [True] * (len(self.state) + len(self.start))
        return [*wanted[:count], *states, *wanted[count:]]


def not_empty(values: State, like: Tensor) -> list[Tensor]:
    """Return a list for the operator: for no tensors, one without elements, as AOTInductor passes no empty list."""
    return list(values) or [like.new_empty(0)]


def _present(values: list[Tensor]) -> list[Tensor]:
    """Undo :func:`not_empty`."""
    return [] if len(values) == 1 and tuple(values[0].shape) == (0,) else values


_SCHEMA = (
    "str graph, Tensor[] inputs, Tensor[] state, Tensor[] start, Tensor[] weights, Tensor? lengths, Tensor? resets, "
    "bool reverse, bool recompute, bool[]? wanted"
)


@functools.lru_cache(256)
def _graph(text: str, gradients: bool) -> Graph:
    """Parse and check a graph's text, which may come from anywhere.

    Raises:
        ValueError: if it is no graph, or breaks the contract of the operator's graphs.
    """
    try:
        graph = Graph.parse(text)
        check_graph(graph, "joint" if gradients else "step")
        _check_gradients(graph)
    except CompilerError as error:
        raise ValueError(f"fusecell::scan was given a graph that it can't run: {error}.") from error
    return graph


def _check_gradients(graph: Graph) -> None:
    """Raise CompilerError if a graph has names that only the compiler may use, or nothing but gradients."""
    names = [graph[index].name for index in graph.leaves("input")] + list(graph.outputs)
    saved = [name for name in names if name.startswith(SAVED)]
    if saved or not [name for name in names if not name.startswith("grad.")]:
        raise CompilerError(f"it has {quoted(saved)}, values that are saved for a backward")


@functools.lru_cache(256)
def inference_kernel(text: str) -> Kernel:
    """Return the kernel of a step's graph, compiled on first use."""
    return compile_graph(without_notes(_graph(text, gradients=False)), about="fusecell::scan, without gradient")


@functools.lru_cache(256)
def training_kernels(text: str, wanted: tuple[bool, ...], recompute: bool) -> Training:
    """Return the kernels of a joint graph for some gradients, compiled on first use."""
    graph = _graph(text, gradients=True)
    inputs = _inputs(graph)
    weights = [graph[index].name for index in graph.leaves("weight")]
    labels = [f"grad.input.{name}" for name in inputs] + [f"grad.weight.{name}" for name in weights]
    if len(wanted) != len(labels):
        raise ValueError(f"fusecell::scan expected wanted to have {len(labels)} flags, got {len(wanted)}.")
    gradients = [label for label, flag in zip(labels, wanted, strict=True) if flag]
    return Training(inputs, weights, partition(graph, gradients, recompute=recompute), "fusecell::scan")


def _inputs(graph: Graph) -> list[str]:
    """Name the inputs of the step; a joint graph also has those that its backward reads."""
    inputs = [graph[index].name for index in graph.leaves("input")]
    return [name for name in inputs if not name.startswith("grad.")]


@functools.lru_cache(256)
def _output_size(text: str, gradients: bool) -> int:
    graph = _graph(text, gradients)
    return graph[graph.outputs["output"]].size


class _Shapes(NamedTuple):
    """What a graph reads: features of inputs, sizes of states and shapes of weights by name, and the dtype."""

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


@register_cache
def _forget_kernels(kinds: Collection[type] | None = None) -> None:
    """Drop the kernels of all graphs: a graph does not say which cell it was traced from."""
    for cached in (_graph, inference_kernel, training_kernels, _output_size, _shapes):
        cached.cache_clear()


def _check(arguments: ScanArguments) -> None:
    """Check the tensors against the graph: the kernel reads as much memory as the graph says.

    Raises:
        ValueError: with the argument, what is expected, and what was passed.
    """
    shapes = _shapes(arguments.graph, arguments.wanted is not None)
    for argument, values, names in (
        ("inputs", arguments.inputs, shapes.inputs),
        ("state", arguments.state, shapes.states),
        ("start", arguments.start, shapes.states if arguments.resets is not None else {}),
        ("weights", arguments.weights, shapes.weights),
    ):
        if len(values) != len(names):
            wanted = ", ".join(map(quoted, list(names)[:8])) or "none"
            raise _mismatch(argument, f"to be {len(names)} tensors ({wanted})", str(len(values)))
        for name, value in zip(names, values, strict=True):
            _check_tensor(f"{argument} {quoted(name)}", value, shapes.dtype)
    for name, value in zip(shapes.inputs, arguments.inputs, strict=True):
        if value.dim() < 2 or 0 in value.shape:
            raise _mismatch(f"inputs {quoted(name)}", "to be (T, N, ...), none of them 0", str(tuple(value.shape)))
    steps, rows = steps_of(tuple(arguments.inputs)), arguments.inputs[0].shape[1]
    for (name, size), value in zip(shapes.inputs.items(), arguments.inputs, strict=True):
        if value.shape[0] not in (1, steps) or value.shape[1] != rows or math.prod(value.shape[2:]) != size[0]:
            expected = f"of shape (1 or {steps}, {rows}, ...) with {size[0]} features"
            raise _mismatch(f"inputs {quoted(name)}", expected, str(tuple(value.shape)))
    for argument, names, values in (
        ("state", shapes.states, arguments.state),
        ("start", shapes.states, arguments.start),
    ):
        for (name, size), value in zip(names.items(), values, strict=False):  # start is empty without resets
            _check_shape(f"{argument} {quoted(name)}", value, (rows, *size))
    for (name, shape), value in zip(shapes.weights.items(), arguments.weights, strict=True):
        _check_shape(f"weights {quoted(name)}", value, shape)
    if arguments.lengths is not None:
        _check_tensor("lengths", arguments.lengths, torch.int64)
        _check_shape("lengths", arguments.lengths, (rows,))
    if arguments.resets is not None:
        _check_tensor("resets", arguments.resets, torch.bool)
        _check_shape("resets", arguments.resets, (steps, rows))


def _check_tensor(name: str, value: Tensor, dtype: torch.dtype) -> None:
    if not value.is_cpu or value.layout is not torch.strided or value.dtype != dtype:
        got = f"{value.dtype} on {value.device}, {value.layout}"
        raise _mismatch(name, f"to be a dense {dtype} on the CPU", got)


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise _mismatch(name, f"of shape {shape}", str(tuple(value.shape)))


def _mismatch(name: str, expected: str, got: str) -> ValueError:
    return ValueError(f"fusecell::scan expected {name} {expected}, as its graph reads it; got {got}.")


@torch.library.custom_op("fusecell::scan", mutates_args=(), device_types="cpu", schema=f"({_SCHEMA}) -> Tensor[]")
def scan(*args: Any) -> list[Tensor]:
    """Return the outputs, the states after the last step and, with gradients, what is saved for the backward."""
    arguments = ScanArguments.of(args)
    _check(arguments)
    if arguments.wanted is None:
        inputs, state, start, weights = map(
            tuple, (arguments.inputs, arguments.state, arguments.start, arguments.weights)
        )
        outputs, after = run_forward(
            inference_kernel(arguments.graph), weights, inputs, state, start, arguments.options
        )
        return [outputs, *after]
    saved, outputs, after = arguments.call().forward(arguments.tensors)
    return [outputs, *after, saved]


@scan.register_fake
def _(*args: Any) -> list[Tensor]:
    arguments, like = ScanArguments.of(args), args[1][0]
    steps, rows = steps_of(tuple(arguments.inputs)), like.shape[1]
    results = [like.new_empty(steps, rows, _output_size(arguments.graph, arguments.wanted is not None))]
    results += [value.new_empty(value.shape) for value in arguments.state]
    if arguments.wanted is not None:
        results.append(like.new_empty(arguments.training().saved_size(steps * rows)))
    return results


@torch.library.custom_op(
    "fusecell::scan_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor saved, Tensor[] grads, {_SCHEMA}) -> Tensor[]",
)
def scan_backward(saved: Tensor, grads: list[Tensor], *args: Any) -> list[Tensor]:
    """Return the gradients of the inputs and weights in ``wanted``, of the states, and of the states to reset to."""
    arguments = ScanArguments.of(args)
    _check(arguments)
    if arguments.wanted is None:
        raise ValueError("fusecell::scan_backward expected wanted, a flag for each input and weight; got None.")
    steps, rows = steps_of(tuple(arguments.inputs)), arguments.inputs[0].shape[1]
    shapes = [
        (steps, rows, _output_size(arguments.graph, gradients=True)),
        *[tuple(value.shape) for value in arguments.state],
    ]
    if len(grads) != len(shapes):
        raise _mismatch("grads", f"to be {len(shapes)} tensors, of the output and each state", str(len(grads)))
    for index, (grad, shape) in enumerate(zip(grads, shapes, strict=True)):
        _check_tensor(f"grads[{index}]", grad, arguments.inputs[0].dtype)
        _check_shape(f"grads[{index}]", grad, shape)
    _check_tensor("saved", saved, arguments.inputs[0].dtype)
    _check_shape("saved", saved, (arguments.training().saved_size(steps * rows),))
    if not saved.is_contiguous():
        raise _mismatch("saved", "as fusecell::scan has returned it", f"one of stride {saved.stride()}")
    gradients = arguments.call().gradients(saved, arguments.tensors, grads)
    each = zip(gradients, arguments.tensors, arguments.has_gradient(), strict=True)
    return [torch.zeros_like(value) if grad is None else grad for grad, value, needed in each if needed]


@scan_backward.register_fake
def _(saved: Tensor, grads: list[Tensor], *args: Any) -> list[Tensor]:
    arguments = ScanArguments.of(args)
    each = zip(arguments.tensors, arguments.has_gradient(), strict=True)
    return [value.new_empty(value.shape) for value, needed in each if needed]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    arguments = ScanArguments.of(inputs)
    ctx.lengths = [len(values) for values in inputs[1:5]]
    ctx.counts = [len(values) for values in (arguments.inputs, arguments.state, arguments.start, arguments.weights)]
    ctx.constants = arguments.graph, arguments.reverse, arguments.recompute, arguments.wanted
    if arguments.wanted is not None:
        ctx.save_for_backward(output[-1], *arguments.tensors, arguments.lengths, arguments.resets)


def _gradient(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    saved, *tensors, lengths, resets = ctx.saved_tensors
    graph, reverse, recompute, wanted = ctx.constants
    arguments = ScanArguments(graph, *_parts(tensors, ctx.counts), lengths, resets, reverse, recompute, wanted)
    results = iter(scan_backward(saved, list(grads[:-1]), *arguments))
    gradients = [next(results) if needed else None for needed in arguments.has_gradient()]
    parts = zip(_parts(gradients, ctx.counts), ctx.lengths, strict=True)
    return (None, *[part or [None] * length for part, length in parts], *[None] * 5)


def _parts(values: list[Any], counts: Sequence[int]) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """Split values into those of inputs, states, states to reset to, and weights."""
    rest = iter(values)
    inputs, state, start, weights = ([next(rest) for _ in range(count)] for count in counts)
    return inputs, state, start, weights


scan.register_autograd(_gradient, setup_context=_save)


@register_flop_formula(torch.ops.fusecell.scan)
def _flops(graph: str, inputs: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Count the operations of a scan's products as ``torch.utils.flop_counter`` does: two for each multiply-add.

    Arguments:
        inputs, args: those of the operator, with shapes in the place of tensors.
    """
    *_, recompute, wanted = args
    if wanted is None:
        return _operations(inference_kernel(graph), inputs)
    return _operations(training_kernels(graph, tuple(wanted), recompute).forward.kernel, inputs)


@register_flop_formula(torch.ops.fusecell.scan_backward)
def _backward_flops(
    saved: Any, grads: Any, graph: str, inputs: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Count those of its backward, which may compute some of the forward's again."""
    *_, recompute, wanted = args
    return _operations(training_kernels(graph, tuple(wanted), recompute).backward.kernel, inputs)


def _operations(kernel: Kernel, inputs: Sequence[Sequence[int]]) -> int:
    """Count the operations of a kernel's products over inputs of some shapes."""
    return 2 * kernel.macs * max(shape[0] for shape in inputs) * inputs[0][1]
