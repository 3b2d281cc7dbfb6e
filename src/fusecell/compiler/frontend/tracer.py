"""Trace a cell's step: run it under the recorder, twice, and return its graph, or the reasons why there is none."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from fusecell.cell import Cell
from fusecell.compiler.frontend.dtypes import COMPILED_DTYPES
from fusecell.compiler.frontend.isolation import isolated
from fusecell.compiler.frontend.signature import HOOKS
from fusecell.compiler.frontend.step_run import StepRun
from fusecell.compiler.frontend.traced_step import Traced, attributes
from fusecell.compiler.frontend.traced_values import Untraceable
from fusecell.compiler.ir.graph import NAME
from fusecell.compiler.refusal import Refusal
from fusecell.errors import CompilerError
from fusecell.forks import new_lock
from fusecell.module_snapshot import Change, Snapshot
from fusecell.shapes import feature_shape, output_shapes, size_text
from fusecell.step_changes import changing_line, explain_changes
from fusecell.torch_internals import computes_weight

__all__ = ["trace"]

# Numbers of rows to choose from. Prime, so that a dimension that is merged with the rows can be told from any other.
_PRIMES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109, 113)
_ABOUT_ROWS = "rows"
_IN_PLACE = "is a view and is being modified inplace"
_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_DENSE = ": keep its zeros, with .to_dense(); in a compiled loop they cost less than looking the others up."
_OVERWRITTEN = "has been modified by an inplace operation"
_PLAIN_TENSORS = (Tensor, nn.Parameter)
# One trace at a time: `intercepted` patches a class of torch's, and `isolated` changes settings of the whole process.
_LOCK = new_lock()


def trace(
    cell: Cell,
    inputs: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    *,
    gradients: bool,
    dtypes: Sequence[torch.dtype] | None = None,
    draws: bool = False,
    leftovers: bool = False,
) -> Traced | Refusal:
    """Trace one step of a cell.

    The outputs of the graph are ``output``, ``state.<name>`` and ``note.<name>``. With ``gradients`` there are also
    the inputs ``grad.output`` and ``grad.<state>`` and the outputs ``grad.input.<name>``, ``grad.state.<name>`` and
    ``grad.weight.<leaf>``, absent where there is no gradient.

    Example:
        >>> import torch, fusecell as fc
        >>> from fusecell.compiler.frontend import trace
        >>> traced = trace(fc.LSTMCell(5, 10), [(5,)], torch.float32, gradients=False)
        >>> sorted(traced.graph.outputs)
        ['note.c', 'note.f', 'note.g', 'note.i', 'note.o', 'output', 'state.c', 'state.h']

    Arguments:
        cell: any cell; it is not changed, and nothing is drawn from torch's global generator.
        inputs: for each input of a step, drawn ones included, its shape without time and batch.
        dtype: of the inputs, float32, float64, bfloat16 or float16; the graph of the last two is in float32.
        gradients: record the backward too.
        dtypes: of each input in the step, where some are integers; a kernel has these as numbers of ``dtype``.
        draws: take random numbers that the step draws as further inputs; without it such a step is refused.
        leftovers: accept a step that leaves tensors in attributes which no later step reads; without it a step that
            changes its module is refused.

    Returns:
        The graph, or the reasons why there is none.
    """
    reasons = _unsupported(cell, dtype) or _empty_sizes(cell, inputs)
    if reasons:
        return Refusal(reasons)
    sizes = _batch_sizes(cell, inputs)
    result = _traced_with(cell, inputs, dtype, gradients, dtypes, sizes[:2], draws, leftovers)
    # A dimension that the step makes may be as long as the batch was, and looks like it: next to another it doesn't.
    if isinstance(result, Refusal) and any(_ABOUT_ROWS in reason for reason in result.reasons) and len(sizes) > 2:
        again = _traced_with(cell, inputs, dtype, gradients, dtypes, sizes[2:], draws, leftovers)
        return again if isinstance(again, Traced) else result
    return result


def _traced_with(
    cell: Cell,
    inputs: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    gradients: bool,
    dtypes: Sequence[torch.dtype] | None,
    sizes: Sequence[int],
    draws: bool,
    leftovers: bool,
) -> Traced | Refusal:
    """Trace a step with two numbers of rows."""
    runs: list[StepRun] = []
    left: set[str] = set()
    with _LOCK, isolated(dtype), _without_parameter_hooks(cell):
        before = Snapshot(cell)
        try:
            # Twice, with other numbers and another batch size: whatever the step computes in Python from either, and a
            # graph would hold as a constant, then comes out differently.
            for rows in (*sizes, sizes[-1]):
                # A third time only where something was left behind: with what a step of the same size has left.
                if len(runs) == len(sizes) and not left:
                    break
                runs.append(
                    StepRun(cell, inputs, dtype, rows, gradients, not runs, dtypes=dtypes, draws=draws, left=left)
                )
                runs[-1] = _ran(runs[-1])
                changes = before.changes()
                if changes and not (leftovers and _are_leftovers(cell, changes)):
                    return _refuse_changes(runs[-1], before, changes)
                left = left | {change.path for change in changes}
            texts = [run.text() for run in runs]
            if left and len(set(texts)) > 1:  # what one step leaves does reach the next
                return _refuse_changes(runs[-1], before, before.changes())
            _check_orders(runs[-1])
        except (Untraceable, CompilerError) as refusal:
            return _refuse(str(refusal), runs, before)
        except Exception as error:  # the step's own: run eagerly it raises again, where the user sees it
            return _refuse(_raised(error, runs), runs, before)
        finally:
            before.restore()
    for text in texts[1:]:
        if text != texts[0]:
            return Refusal((_difference(texts[0], text),))
    return replace(runs[0].traced(), leftovers=tuple(sorted(left)))


def _check_orders(run: StepRun) -> None:
    """Refuse a step that returns a state in another order in memory, where it would draw in that order at the next."""
    orders = run.returned_orders
    if not orders:
        return
    again = replace(run, named=False, names={}, outputs={}, row_shapes={}, orders=orders, returned_orders={})
    try:
        if _ran(again).text() == run.text():
            return
    except Untraceable:
        pass  # it draws into a tensor like the state
    state = next(iter(orders))
    raise Untraceable(
        f"The step draws random numbers, and returns the state {state} with its dimensions in another order in memory, "
        f"in which torch would draw numbers like it at the next step; return {state}.contiguous()."
    )


def _raised(error: Exception, runs: Sequence[StepRun]) -> str:
    """Say what the step has raised, in fewer words than torch where it is a change in place."""
    if _OVERWRITTEN in str(error):
        return (
            "The step changes in place a value that its gradient needs, such as the result of sigmoid or tanh, which "
            "raises in the Python loop too; compute a new tensor: g.sigmoid() for g.sigmoid_()."
        )
    without_gradient = re.search(r"derivative for aten::(\w+) is not implemented", str(error))
    if without_gradient:
        name = without_gradient[1].rstrip("_")
        return (
            f"The step needs a gradient of {name}, which torch has none for: the Python loop raises in its backward as "
            f"well. Where it is to count as constant, detach what {name} is given, x.detach()."
        )
    return f"The step raised {type(error).__name__}: {error}{_of_rows(error, runs)}"


def _of_rows(error: Exception, runs: Sequence[StepRun]) -> str:
    """Explain a number in an error that the user has not written: that of the trace's rows."""
    if not runs or not re.search(rf"\b{runs[-1].rows}\b", str(error)):
        return ""
    return (
        f" ({runs[-1].rows} is the number of rows that the step was tried with: it takes any. A tensor with a row for "
        "each of a batch, kept on the module from step to step, belongs into the state.)"
    )


def _are_leftovers(cell: Cell, changes: Sequence[Change]) -> bool:
    """Whether all that a step has changed are attributes of modules, set to tensors or to empty containers."""
    for change in changes:
        owner, _, name = change.path.rpartition(".")
        module = dict(cell.named_modules()).get(owner)
        if change.how not in ("sets", "adds") or change.path != change.attribute or module is None:
            return False
        value = getattr(module, name, None)
        if type(value) is not Tensor and not (isinstance(value, dict | list) and not value):
            return False
    return True


def _ran(run: StepRun) -> StepRun:
    """Run a step; without gradients once more where torch allows an operation in place only then."""
    try:
        run.run()
    except RuntimeError as error:
        if run.gradients or _IN_PLACE not in str(error):
            raise
        run = replace(run, names={}, outputs={}, row_shapes={})
        with torch.no_grad():
            run.run()
    return run


def _refuse(reason: str, runs: Sequence[StepRun], before: Snapshot) -> Refusal:
    """Refuse a step that was not traced to its end, and say what it had changed of its module by then."""
    changes = before.changes()
    if not changes:
        return Refusal((reason,))
    refusal = _refuse_changes(runs[-1], before, changes)
    return Refusal((*refusal.reasons, reason), refusal.changes)


def _refuse_changes(run: StepRun, before: Snapshot, changes: list[Change]) -> Refusal:
    """Refuse a step that changes its module; it is run once more, line by line, to name the user's line."""
    before.restore()
    again = replace(run, named=False, names={}, outputs={}, row_shapes={})
    line = changing_line(before, again.run)
    return Refusal((explain_changes(changes, line),), tuple(dict.fromkeys(change.attribute for change in changes)))


def _has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks, other than those that compute its weights before it."""
    return any(not computes_weight(hook) for kind in HOOKS for hook in getattr(module, kind, {}).values())


def _unsupported(cell: Cell, dtype: torch.dtype) -> tuple[str, ...]:
    """List the reasons for which a cell is not traced at all."""
    if dtype not in COMPILED_DTYPES:
        return (f"Only float32, float64, bfloat16 and float16 are compiled, the cell computes in {dtype}.",)
    reasons = [
        f"The submodule {name} has hooks, which may do anything."
        for name, module in cell.named_modules()
        if module is not cell and _has_hooks(module)
    ]
    names = (*cell.states, *cell.inputs)
    if len(set(cell.states)) < len(cell.states) or not all(map(NAME.fullmatch, names)):
        reasons.append(
            f"Its states are called {', '.join(map(repr, cell.states))}, its inputs "
            f"{', '.join(map(repr, cell.inputs))}: names are letters, digits, _ and points, and no two states have the "
            "same."
        )
    # A kernel reads memory: a subclass may have none, or give its elements another meaning.
    reasons += [
        f"{path} is initialized by the first call."
        if isinstance(value, UninitializedBuffer | UninitializedParameter)
        else f"{path} is a {type(value).__name__}, a subclass of Tensor."
        for path, value in attributes(cell)
        if type(value) not in _PLAIN_TENSORS
    ]
    reasons += [
        f"The cell's {name} is not a dense tensor on the CPU{_DENSE if tensor.layout in _SPARSE else '.'}"
        for name, tensor in attributes(cell)
        if not tensor.is_cpu or tensor.layout is not torch.strided
    ]
    shared = nn.modules.module
    if any(getattr(shared, f"_global{kind}", None) for kind in HOOKS):
        reasons.append("Hooks on all modules are registered, which may do anything.")
    return tuple(reasons)


def _empty_sizes(cell: Cell, inputs: Sequence[tuple[int, ...]]) -> tuple[str, ...]:
    """List the inputs, states and outputs that have no numbers."""
    shapes = {
        **{f"input {name}": shape for name, shape in zip(cell.inputs, inputs, strict=False)},
        **{f"state {name}": feature_shape(size) for name, size in zip(cell.states, cell.state_sizes, strict=False)},
        **output_shapes(cell.output_size),
    }
    return tuple(
        f"Its {name} has the size {size_text(shape, 'N')}, and no numbers: a kernel takes one and more. Leave it out."
        for name, shape in shapes.items()
        if 0 in shape
    )


def _difference(first: str, second: str) -> str:
    """Say in what the texts of two traces of one step differ."""
    start = "The step depends on the batch size or on a tensor's value: traced twice, with different rows, it "
    for one, other in zip(first.splitlines(), second.splitlines(), strict=False):
        if one != other:
            return f"{start}computed `{one}` and `{other}`."
    return f"{start}did more at one time than at the other."


def _batch_sizes(cell: Cell, inputs: Sequence[tuple[int, ...]]) -> list[int]:
    """Choose two numbers of rows that no dimension has, or is a multiple of, and two more for another attempt."""
    # A dimension of the trace that has this size is then the batch, whatever the step has reshaped.
    sizes = (cell.input_size, cell.hidden_size, *cell.state_sizes)
    shapes = [*map(feature_shape, sizes), *output_shapes(cell.output_size).values(), *inputs]
    # Merged with others too, as a flat row is.
    dims = {size for shape in shapes for size in (*shape, math.prod(shape))}
    dims.update(size for _, tensor in attributes(cell) for size in tensor.shape)
    free = [prime for prime in _PRIMES if all(size == 0 or size % prime for size in dims)]
    return [*free, 10007, 10009][:4]


@contextmanager
def _without_parameter_hooks(cell: Cell) -> Iterator[None]:
    """Take the hooks off parameters for the block: they belong to the user's backward, not to a trace's."""
    tables = [value._backward_hooks for _, value in attributes(cell) if value._backward_hooks]
    copies = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, hooks in zip(tables, copies, strict=True):
            table.update(hooks)
