"""The runner for torch.compile and torch.export: while torch traces, a sequence is one call of ``fusecell::scan``.

torch's tracer takes the operator for a node of its own graph. Which graph that node has is found out by running
:func:`_described` for real in the middle of the trace, once, and its result is a constant of the trace.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor, nn

from fusecell.attribute_paths import is_plain
from fusecell.cell import Cell
from fusecell.compiler.dispatch.scan_operator import inference_kernel, not_empty, scan, training_kernels
from fusecell.compiler.frontend import Traced, trace
from fusecell.compiler.frontend.dtypes import has_16_bits, rounded, widened
from fusecell.compiler.frontend.guards import constants
from fusecell.compiler.frontend.weight_prologue import Prologue
from fusecell.compiler.programs.rebind import rebound
from fusecell.compiler.refusal import Refusal, refusal
from fusecell.eager import run_eager
from fusecell.errors import CompilerError, EagerWarning
from fusecell.execution.context import recomputing
from fusecell.execution.options import Options, State
from fusecell.execution.runners import register, run
from fusecell.shapes import Outputs, is_size, unpacked
from fusecell.torch_internals import TAKES_MODULES_AS_CONSTANTS, disable_current_modes
from fusecell.validation import first_state

__all__ = ["run_traced"]

Constants = tuple[tuple[str, object], ...]


Described = tuple[str, tuple[str, ...], int, Constants]
"""A cell's step as the operator takes it: plain values, which torch can have as constants of a trace.

The graph's text, a joint one for gradients, and empty if the step cannot be compiled; the paths of the tensor
attributes that it is computed from; the number of the prologue that computes the graph's weights from them, -1 where
they are the weights; path and value of each number, flag and name in the cell: torch traces again if one changes.
"""
_UNROLLED: Described = ("", (), -1, ())


def _run_outside(
    owner: nn.Module, inputs: State, state: State, options: Options, leaf: int = -1
) -> tuple[Outputs, State]:
    """Run a cell outside of torch's graph, which a torch before 2.12 breaks for it."""
    cell: Any = owner.leaf_cells()[leaf][2] if leaf >= 0 else owner  # type: ignore[operator]  # a drop-in layer's method
    return run(cell, inputs, state, options)


def run_traced(
    owner: nn.Module, inputs: State, state: State, options: Options, leaf: int = -1
) -> tuple[Outputs, State]:
    """Run a cell while torch traces it: one operator, or a loop that torch unrolls where the cell can't be compiled.

    Arguments:
        owner: the cell, or a drop-in layer.
        leaf: which of the layer's cells.
    """
    size: Any = owner.output_size if isinstance(owner, Cell) else None
    wanted = tuple([value.requires_grad for value in inputs]) if torch.is_grad_enabled() else None
    # A size may be symbolic in a trace; the length of a list is an integer, and torch guards it.
    features = tuple([tuple([len([0] * size) for size in value.shape[2:]]) for value in inputs])
    recompute = bool(options.recompute or recomputing())
    text, paths, prologue, values = _described(owner, leaf, features, inputs[0].dtype, wanted, recompute)
    if not text or not _usual((*inputs, *state)):
        if leaf >= 0:
            owner = owner.leaf_cells()[leaf][2]  # type: ignore[operator]  # a drop-in layer's method
        assert isinstance(owner, Cell)
        return run_eager(owner, inputs, state, options)
    for path, value in values:
        # torch installs a guard for each attribute that it sees read here. A NaN is not equal to itself.
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
    dtype, shapes = inputs[0].dtype, [value.shape for value in state]
    # The operator has all features of a row in one dimension.
    inputs = tuple([value[..., None] if value.dim() < 3 else value.flatten(2) for value in inputs])
    state, start = _flat_rows(state), _flat_rows(start)
    if has_16_bits(dtype):
        inputs, state, start = widened(inputs), widened(state), widened(start)
    results: State = tuple(
        scan(
            text, list(inputs), not_empty(state, inputs[0]), not_empty(start, inputs[0]), not_empty(weights, inputs[0]),
            options.lengths, options.resets, options.reverse, recompute, flags,
        )
    )[: 1 + len(state)]  # fmt: skip
    if has_16_bits(dtype):
        results = rounded(results, dtype)
    outputs: Outputs = results[0]
    if isinstance(size, tuple) and is_size(size):
        outputs = results[0].reshape(*results[0].shape[:2], *size)
    elif size is not None:
        outputs = unpacked(size, results[0], 2)
    return outputs, tuple([value.reshape(shape) for value, shape in zip(results[1:], shapes, strict=True)])


def _flat_rows(state: State) -> State:
    """Return states as (N, size) each."""
    return tuple([value if value.dim() == 2 else value.reshape(value.shape[0], -1) for value in state])


def _usual(tensors: State) -> bool:
    """Whether tensors, which may be fake, are such as a kernel can read."""
    first = tensors[0]
    return all(value.device.type == "cpu" and value.dtype == first.dtype and 0 not in value.shape for value in tensors)


def _attribute(owner: Any, path: str) -> Any:
    """Return an attribute by path; in a loop that torch can trace, which ``attrgetter`` is not."""
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
    """Describe a cell's step; torch runs this untraced, on the module itself, and takes the result as a constant.

    In an export the weights are fake, so the step is traced with real ones of their shapes.
    """
    # Out of the fake tensors' mode of torch's trace; gradients on, as in the call that it will become.
    with disable_current_modes(), torch.enable_grad():
        suffix, cell = "", owner
        if leaf >= 0:
            layer, direction, cell = owner.leaf_cells()[leaf]  # type: ignore[operator]  # a drop-in layer's method
            suffix = f"_l{layer}_reverse" if direction else f"_l{layer}"
        assert isinstance(cell, Cell)
        twin = rebound(cell, {path: _real(value) for path, value in list(_tensors(cell))}, ())
        traced = trace(twin, features, dtype, gradients=wanted is not None)
        if isinstance(traced, Traced) and not traced.is_plain:
            traced = Refusal(("It reads values of its buffers, or its output has another dtype than its states.",))
        reasons = traced.reasons if isinstance(traced, Refusal) else _compiled(traced, twin, wanted, recompute)
        if isinstance(traced, Refusal) or reasons:
            warnings.warn(f"{type(cell).__name__} is unrolled: {' '.join(reasons)}", EagerWarning, stacklevel=2)
            return _UNROLLED
        inside = [path for path, _ in traced.weights.sources if not is_plain(path)]
        if inside:
            warnings.warn(
                f"{type(cell).__name__} is unrolled: torch.compile reads the attributes of a module alone, and the "
                f"step reads {inside[0]}; keep it on the cell with register_buffer.",
                EagerWarning,
                stacklevel=2,
            )
            return _UNROLLED
        prologue, values = traced.weights, () if leaf >= 0 else tuple(constants(cell))
        paths = prologue.direct_paths
        if paths is not None:
            return traced.graph.text, tuple([path + suffix for path in paths]), -1, values
        paths = [path + suffix for path, _ in prologue.sources]
        return traced.graph.text, tuple(paths), _number_of(owner, prologue), values


_NUMBERS: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], int]] = WeakKeyDictionary()
"""The numbers of the prologues of each module that torch has traced: a trace lives no longer than its module."""
_PROLOGUES: dict[int, Prologue] = {}
_COUNTER = itertools.count()


def _number_of(owner: nn.Module, prologue: Prologue) -> int:
    """Return the number by which a trace of the module finds a prologue, for as long as the module lives."""
    if owner not in _NUMBERS:
        # The finalizer gets the inner dict itself: when it runs, the weak table has lost its entry.
        finalize(owner, _drop, _NUMBERS.setdefault(owner, {}))
    numbers = _NUMBERS[owner]
    key = (prologue.describe(), *[step.func for step in prologue.steps])
    if key not in numbers:
        numbers[key] = next(_COUNTER)
        _PROLOGUES[numbers[key]] = prologue
    return numbers[key]


def _drop(numbers: dict[tuple[object, ...], int]) -> None:
    """Drop the prologues with these numbers."""
    for number in numbers.values():
        del _PROLOGUES[number]


@torch._dynamo.allow_in_graph  # type: ignore[untyped-decorator]
def _computed(index: int, *originals: Tensor) -> State:
    """Compute a step's weights; a node of torch's graph, which has no tracer enter the prologue."""
    return _PROLOGUES[index].computed(originals)


def _compiled(traced: Traced, cell: Cell, wanted: Sequence[bool] | None, recompute: bool) -> tuple[str, ...]:
    """Compile the kernels already in the trace; return the reasons if that fails, while torch can still unroll."""
    try:
        if wanted is None:
            inference_kernel(traced.graph.text)
        else:
            flags = [value.requires_grad for value in traced.weights.values(cell)]
            training_kernels(traced.graph.text, (*wanted, *flags), recompute)
    except (CompilerError, AssertionError, LookupError) as error:
        return refusal(error).reasons
    return ()


def _tensors(cell: Cell) -> Iterator[tuple[str, Tensor]]:
    """Yield path and value of every parameter, buffer and tensor attribute of a cell."""
    for prefix, module in cell.named_modules():
        start = prefix + "." if prefix else ""
        for table in (module._parameters, module._buffers, vars(module)):
            yield from ((start + name, value) for name, value in table.items() if isinstance(value, Tensor))


def _real(value: Tensor) -> Tensor:
    """Return a tensor with memory like one that may be fake."""
    result = torch.zeros([int(size) for size in value.shape], dtype=value.dtype, device="cpu")
    if not result.is_floating_point():
        return result
    # A trace is the same for any values, but its gradient is checked where a function has one: not at 0, as relu's.
    result.copy_(torch.linspace(-0.7, 0.8, result.numel()).reshape(result.shape))
    return nn.Parameter(result, requires_grad=value.requires_grad)


if TAKES_MODULES_AS_CONSTANTS:
    register("traced", run_traced)
else:
    register(
        "traced",
        torch._dynamo.disable(  # type: ignore[no-untyped-call]  # torch's
            _run_outside,
            reason="fusecell's layers in one graph, fullgraph=True and torch.export, take torch 2.12 or newer; without "
            "fullgraph torch.compile calls them between its graphs",
        ),
    )
