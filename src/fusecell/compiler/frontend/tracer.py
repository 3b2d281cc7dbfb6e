"""Trace a cell's step: run it under the recorder, twice, and return its graph, or the reasons why there is none."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

from fusecell.attribute_paths import tensors_inside
from fusecell.cell import Cell, capture_intermediates
from fusecell.compiler.frontend.custom_functions import intercepted
from fusecell.compiler.frontend.draws import Draw, draw_name
from fusecell.compiler.frontend.dtypes import COMPILED_DTYPES, GRAPH_DTYPES, casts_of
from fusecell.compiler.frontend.isolation import ValueReadGuard, isolated
from fusecell.compiler.frontend.prologue_check import check_gradients
from fusecell.compiler.frontend.recorder import Recorder
from fusecell.compiler.frontend.signature import attribute_names
from fusecell.compiler.frontend.sums_over_rows import as_matrix
from fusecell.compiler.frontend.traced_values import Row, Sum, Untraceable
from fusecell.compiler.frontend.weight_prologue import Prologue
from fusecell.compiler.ir.graph import Builder, Graph
from fusecell.compiler.ir.naming import name_values
from fusecell.compiler.refusal import Refusal
from fusecell.eager import checked_output
from fusecell.errors import CompilerError
from fusecell.forks import new_lock
from fusecell.module_snapshot import Change, Snapshot
from fusecell.shapes import Shape, feature_shape, is_size, output_shape, output_shapes, packed, size_text
from fusecell.step_changes import changing_line, explain_changes
from fusecell.torch_internals import is_wrapped

__all__ = ["Traced", "input_names", "trace"]

# Numbers of rows to choose from. Prime, so that a dimension that is merged with the rows can be told from any other.
_PRIMES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109, 113)
_ABOUT_ROWS = "rows"
_IN_PLACE = "is a view and is being modified inplace"
_PLAIN_TENSORS = (Tensor, nn.Parameter)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# One trace at a time: `intercepted` patches a class of torch's, and `isolated` changes settings of the whole process.
_LOCK = new_lock()


@dataclass(frozen=True)
class Traced:
    """A step as a graph.

    Attributes:
        graph: the step and, if asked for, its gradient: one joint graph.
        weights: how the weight leaves of the graph are made at each call, in the order of ``graph.leaves("weight")``.
        dtype: of the step's inputs, states and results; the graph computes in float32 where it has 16 bits.
        shapes: of a row of each output and note, by its label in the graph, which has all features in one dimension.
        draws: the random numbers that a step draws: inputs of the graph, behind the cell's own.
        leftovers: paths of attributes that each step sets to a tensor and no step reads.
        output_dtype: what the output is converted to after the kernel: that of spikes, say, of ``(v > 1).float()``.
    """

    graph: Graph
    weights: Prologue
    dtype: torch.dtype
    shapes: Mapping[str, Shape]
    draws: tuple[Draw, ...] = ()
    leftovers: tuple[str, ...] = ()
    output_dtype: torch.dtype | None = None

    @property
    def is_plain(self) -> bool:
        """Whether a call is the kernel and nothing before or after it."""
        return not (self.draws or self.leftovers or self.output_dtype is not None or self.weights.assumed)

    @property
    def draw_names(self) -> tuple[str, ...]:
        """The names of the inputs that are draws, which come behind the cell's own."""
        return tuple(map(draw_name, range(len(self.draws))))

    @cached_property
    def weight_names(self) -> tuple[str, ...]:
        """The names of the weight leaves, in order."""
        return tuple(self.graph[index].name for index in self.graph.leaves("weight"))


def input_names(cell: Cell) -> tuple[str, ...]:
    """Name the inputs of a cell's graph: as the cell does, but for one that has the name of a state."""
    return tuple(f"{name}.input" if name in cell.states else name for name in cell.inputs)


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
    reasons = _unsupported(cell, dtype)
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
    runs: list[_Run] = []
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
                runs.append(_Run(cell, inputs, dtype, rows, gradients, not runs, dtypes=dtypes, draws=draws, left=left))
                runs[-1] = _ran(runs[-1])
                changes = before.changes()
                if changes and not (leftovers and _are_leftovers(cell, changes)):
                    return _refuse_changes(runs[-1], before, changes)
                left = left | {change.path for change in changes}
            texts = [run.text() for run in runs]
            if left and len(set(texts)) > 1:  # what one step leaves does reach the next
                return _refuse_changes(runs[-1], before, before.changes())
        except (Untraceable, CompilerError) as refusal:
            return _refuse(str(refusal), runs, before)
        except Exception as error:  # the step's own: run eagerly it raises again, where the user sees it
            return _refuse(f"The step raised {type(error).__name__}: {error}", runs, before)
        finally:
            before.restore()
    for text in texts[1:]:
        if text != texts[0]:
            return Refusal((_difference(texts[0], text),))
    return replace(runs[0].traced(), leftovers=tuple(sorted(left)))


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


def _ran(run: _Run) -> _Run:
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


def _refuse(reason: str, runs: Sequence[_Run], before: Snapshot) -> Refusal:
    """Refuse a step that was not traced to its end, and say what it had changed of its module by then."""
    changes = before.changes()
    if not changes:
        return Refusal((reason,))
    refusal = _refuse_changes(runs[-1], before, changes)
    return Refusal((*refusal.reasons, reason), refusal.changes)


def _refuse_changes(run: _Run, before: Snapshot, changes: list[Change]) -> Refusal:
    """Refuse a step that changes its module; it is run once more, line by line, to name the user's line."""
    before.restore()
    again = replace(run, named=False, names={}, outputs={}, row_shapes={})
    line = changing_line(before, again.run)
    return Refusal((explain_changes(changes, line),), tuple(dict.fromkeys(change.attribute for change in changes)))


_INSTEAD_OF_HOOKS = {
    "WeightNorm": "; use torch.nn.utils.parametrizations.weight_norm, which has none",
    "SpectralNorm": "; use torch.nn.utils.parametrizations.spectral_norm, which has none",
}


def _hook_of(module: nn.Module) -> str:
    """Return the class of a module's first hook that is called before it."""
    return next((type(hook).__name__ for hook in module._forward_pre_hooks.values()), "")


def _unsupported(cell: Cell, dtype: torch.dtype) -> tuple[str, ...]:
    """List the reasons for which a cell is not traced at all."""
    if dtype not in COMPILED_DTYPES:
        return (f"Only float32, float64, bfloat16 and float16 are compiled, the cell computes in {dtype}.",)
    reasons = [
        f"The submodule {name} has hooks, which may do anything{_INSTEAD_OF_HOOKS.get(_hook_of(module), '')}."
        for name, module in cell.named_modules()
        if module is not cell and any(getattr(module, kind, None) for kind in _HOOKS)
    ]
    # A kernel reads memory: a subclass may have none, or give its elements another meaning.
    reasons += [
        f"{path} is a {type(value).__name__}, a subclass of Tensor."
        for path, value in attributes(cell)
        if type(value) not in _PLAIN_TENSORS
    ]
    reasons += [
        f"The cell's {name} is not a dense tensor on the CPU."
        for name, tensor in attributes(cell)
        if not tensor.is_cpu or tensor.layout is not torch.strided
    ]
    shared = nn.modules.module
    if any(getattr(shared, f"_global{kind}", None) for kind in _HOOKS):
        reasons.append("Hooks on all modules are registered, which may do anything.")
    return tuple(reasons)


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


def attributes(cell: Cell) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor that is an attribute of a cell or of its submodules, with its path."""
    for prefix, module in cell.named_modules():
        start = prefix + "." if prefix else ""
        own = attribute_names(module)
        for table in (module._parameters, module._buffers, vars(module)):
            for name, value in table.items():
                if isinstance(value, Tensor):
                    yield start + name, value
                elif name in own and name.isidentifier():
                    yield from tensors_inside(value, start + name)


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


class _Seed(torch.autograd.Function):
    """A number whose gradient with respect to each result is a tensor of our choice.

    ``torch.autograd.grad(..., grad_outputs=)`` takes such tensors too, but its first call takes 0.3 s (torch 2.13).
    """

    @staticmethod
    def forward(ctx: Any, seeds: list[Tensor], *results: Tensor) -> Tensor:
        ctx.seeds = seeds
        return seeds[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return (None, *ctx.seeds)


@dataclass
class _Run:
    """One run of a step, with one number of rows.

    Arguments:
        shapes: of the inputs of a step, without time and batch.
        named: whether the names of the step's variables are taken.
        dtypes: of the inputs, where some are integers.
        draws: whether the step may draw random numbers.
        left: paths of attributes that an earlier run has left behind, and that are not the cell's own.
    """

    cell: Cell
    shapes: Sequence[tuple[int, ...]]
    dtype: torch.dtype
    rows: int
    gradients: bool
    named: bool
    names: dict[int, str] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    dtypes: Sequence[torch.dtype] | None = None
    draws: bool = False
    left: Collection[str] = ()
    output_dtype: torch.dtype | None = None
    row_shapes: dict[str, Shape] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sources: dict[int, tuple[str, Tensor]] = {}
        leftovers: dict[int, tuple[str, Tensor]] = {}
        for path, tensor in attributes(self.cell):
            (leftovers if path in self.left else sources).setdefault(id(tensor), (path, tensor))
        self.builder = Builder("step", GRAPH_DTYPES[self.dtype])
        # Another seed for each run: a branch on a value then goes two ways, if it can.
        self.generator = torch.Generator().manual_seed(self.rows)
        generator = self.generator if self.draws else None
        self.recorder = Recorder(self.builder, self.rows, self.dtype, sources, leftovers, generator)

    def run(self) -> None:
        """Run the step, and its gradient if asked for, under the recorder."""
        dtypes = self.dtypes or (self.dtype,) * len(self.shapes)
        x = [
            self._leaf("input", name, shape, dtype)
            for name, shape, dtype in zip(input_names(self.cell), self.shapes, dtypes, strict=True)
        ]
        state = [
            self._leaf("state", name, feature_shape(size), self.dtype)
            for name, size in zip(self.cell.states, self.cell.state_sizes, strict=True)
        ]
        recorder = self.recorder
        with (
            recorder, ValueReadGuard(recorder.may_read), intercepted(recorder.on_apply),
            capture_intermediates(self._note), self._watched(),
        ):  # fmt: skip
            result = self.cell.step(tuple(x) if len(self.cell.inputs) > 1 else x[0], tuple(state))
        output, after = self._results(result)
        if self.gradients:
            check_gradients(recorder)
            self._backward(x, state, output, after)

    def text(self) -> str:
        """Return what two runs must agree in."""
        graph = self.builder.build(self.outputs, keep_all=bool(self.recorder.draws))
        return graph.text + self.recorder.weights.prologue().describe() + "".join(map(str, self.recorder.draws))

    def traced(self) -> Traced:
        """Return what was recorded, in the user's names."""
        names = dict(self.names)
        for label, node in self.outputs.items():
            kind, _, name = label.partition(".")
            if kind == "state" and names.get(node, name) == name:
                names[node] = f"{name}.new"
            elif kind == "grad":
                of_state = label.startswith("grad.state.")
                names.setdefault(node, f"grad.{name.partition('.')[2]}{'.new' * of_state}")
        graph = name_values(self.builder.build(self.outputs, keep_all=True), names)
        draws = tuple(self.recorder.draws)
        prologue = self.recorder.weights.prologue()
        prologue.assume(self.cell)
        return Traced(graph, prologue, self.dtype, self.row_shapes, draws, output_dtype=self.output_dtype)

    def _watched(self) -> AbstractContextManager[None]:
        # Profiling every call costs more than the rest of a small trace: the second run needs no names.
        return _variables_of_steps(self._name_variable) if self.named else nullcontext()

    def _leaf(self, op: str, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        node = self.builder.append(op, (), {"shape": [math.prod(shape)]}, name)
        tensor = self._random((self.rows, *shape), dtype)
        if self.gradients and dtype.is_floating_point and not name.startswith("grad."):
            # No leaf of autograd: in place on one torch raises before the recorder can say where.
            tensor = tensor.requires_grad_().clone()
        self.recorder.know(tensor, Row(tuple(tensor.shape), node), fixed=True)
        return tensor

    def _random(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if not dtype.is_floating_point:  # 0 and 1 are indices of nearly every table
            return torch.randint(0, 2, shape, generator=self.generator, dtype=dtype, device="cpu")
        # Between 0.1 and 0.9: logarithms and roots are finite, and no value lies at a kink of an activation.
        return torch.rand(shape, generator=self.generator, dtype=dtype, device="cpu") * 0.8 + 0.1

    # names

    def _note(self, cell: Cell, name: str, value: Tensor) -> None:
        if is_wrapped(value):  # inside of a transform there is no value of the step's own
            return
        path = next((prefix for prefix, module in self.cell.named_modules() if module is cell), "")
        label = f"note.{path}.{name}" if path else f"note.{name}"
        if label in self.outputs:
            raise Untraceable(f"The step notes {name} twice.")
        node = self._node(value)
        self.outputs[label] = node
        self.row_shapes[label] = tuple(value.shape[1:])
        self.names.setdefault(node, name)

    def _name_variable(self, name: str, value: Tensor) -> None:
        if is_wrapped(value) or not self.recorder.is_known(value):
            return
        # A part of a node, such as one gate of a product of three, would give the whole its name.
        row = self.recorder.value(value)
        if isinstance(row, Row) and row.index is None:
            self.names.setdefault(row.node, name)

    # results

    def _results(self, result: Any) -> tuple[Tensor, list[Tensor]]:
        name = type(self.cell).__name__
        # Checked here, not left to a later failure, as the message can name the contract.
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], tuple | list)):
            raise Untraceable(f"{name}.step doesn't return (output, state) with state a tuple.")
        output, after = result[0], list(result[1])
        if len(after) != len(self.cell.states):
            raise Untraceable(f"{name}.step returns {len(after)} states, {len(self.cell.states)} are expected.")
        labels = ["output", *(f"state.{state}" for state in self.cell.states)]
        output = self._packed(output)
        shapes = [output_shape(self.cell.output_size), *map(feature_shape, self.cell.state_sizes)]
        for label, shape, value in zip(labels, shapes, [output, *after], strict=True):
            is_dtype = value.dtype == self.dtype
            if label == "output" and value.dtype in (*casts_of(self.dtype), torch.bool, torch.int64):
                self.output_dtype, is_dtype = value.dtype, True
            if tuple(value.shape) != (self.rows, *shape) or not is_dtype:
                actual = f"{tuple(value.shape)} and {value.dtype}"
                raise Untraceable(
                    f"{label} has shape and dtype {actual}, expected {size_text(shape, 'N')} and {self.dtype}."
                )
            self.outputs[label] = self._node(value)
            self.row_shapes[label] = shape
        return output, after

    def _packed(self, output: Any) -> Any:
        """Return a tuple or dict of outputs as one flat row."""
        size = self.cell.output_size
        if is_size(size):
            return output
        try:
            with self.recorder:
                return packed(checked_output(self.cell, output, self.rows), 1)
        except (TypeError, ValueError) as error:
            raise Untraceable(str(error)) from error

    def _node(self, tensor: Tensor) -> int:
        """Return the node of all features of a tensor, as numbers per row."""
        value = self.recorder.value(tensor)
        if isinstance(value, Sum):
            raise Untraceable("The step mixes the rows of the batch: a sum over them is among the results.")
        row = self.recorder.writer.number(value)
        if row.axis != 0:
            row = self._spread_over_rows(row)
        return self.recorder.writer.flat(row)

    def _spread_over_rows(self, row: Row) -> Row:
        """Return what is the same for all rows as a value per row."""
        if row.axis is not None:
            raise Untraceable("A result has its batch dimension not first.")
        return Row((self.rows, *row.shape), row.node, 0, row.full_index)

    # the gradient

    def _backward(self, x: list[Tensor], state: list[Tensor], output: Tensor, after: list[Tensor]) -> None:
        recorder, cell = self.recorder, self.cell
        labels = ["grad.output", *(f"grad.{name}" for name in cell.states)]
        results = [output, *after]
        seeds = [
            self._leaf("input", label, tuple(value.shape[1:]), self.dtype)
            for label, value in zip(labels, results, strict=True)
        ]
        slots = recorder.weights
        sources = {slot: slots.slots[slot].tensor for slot in range(len(slots.slots))}
        sources = {slot: tensor for slot, tensor in sources.items() if tensor is not None and tensor.requires_grad}
        if not any(value.requires_grad for value in results):
            return
        # Of integers there are no gradients.
        named = [*zip((f"grad.input.{name}" for name in input_names(cell)), x, strict=True)]
        named = [(label, value) for label, value in named if value.is_floating_point()]
        named += zip((f"grad.state.{name}" for name in cell.states), state, strict=True)
        leaves: list[Any] = [*(value for _, value in named), *sources.values()]
        recorder.backward = True
        with recorder, ValueReadGuard():
            handles = list(recorder.watch())
            try:
                number = _Seed.apply(seeds, *results)  # type: ignore[no-untyped-call]
                # torch.autograd.grad would put the guard aside for as long as it runs.
                gradients = torch.autograd.graph._engine_run_backward(
                    (number,), (torch.ones_like(number),), False, False, tuple(leaves), True, False
                )
            finally:
                for handle in handles:
                    handle.remove()
        for (label, _), gradient in zip(named, gradients, strict=False):
            if gradient is not None:
                self.outputs[label] = self._node(gradient)
        for slot, gradient in zip(sources, gradients[len(named) :], strict=True):
            if gradient is not None:
                recorder.collect(slot, recorder.value(gradient))
        self._weight_gradients()

    def _weight_gradients(self) -> None:
        """Add the gradient of every weight leaf to the outputs."""
        recorder = self.recorder
        for slot, gradient in recorder.gradients.items():
            if not isinstance(gradient, Sum):
                continue
            # Of a weight that the graph takes in two forms the leaf of the gradient's form has all of the gradient. A
            # custom Function may have a gradient for a weight that it multiplies with what it makes of the weight.
            is_matrix = len(self.builder.nodes[gradient.node].type.shape) == 2
            forms = [form for leaf_slot, form in recorder.weights.leaves if leaf_slot == slot]
            shape = recorder.weights.slots[slot].shape
            # What rows were taken from, such as matrices of experts.
            is_table = is_matrix and len(shape) > 2 and math.prod(shape[:-2]) > 1
            form = "table" if is_table else "matrix" if is_matrix else "vector"
            node = gradient.node
            if forms == ["matrix"] and not is_matrix:
                form, node = "matrix", as_matrix(self.builder, node, gradient.shape[-2:])
            leaf = self.builder.nodes[recorder.weights.leaf(slot, form)]
            if self.builder.nodes[node].type.shape != leaf.type.shape:
                raise Untraceable(f"The gradient of {leaf.name} has another shape than {leaf.name}.")
            self.outputs[f"grad.weight.{leaf.name}"] = node


@contextmanager
def _variables_of_steps(on_variable: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Pass the variables of every ``step`` that returns inside the block to ``on_variable(name, value)``.

    Under a profiler of Python's own that is written in C none are passed: there is no way to put it back.
    """
    # A profile function sees the locals of a frame as it returns, without a change to the user's code.
    before = sys.getprofile()
    if before is not None and not callable(before):
        yield
        return

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "return" and _is_step(frame):
            for name, value in frame.f_locals.items():
                if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                    on_variable(name, value)

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(before)


def _is_step(frame: FrameType) -> bool:
    code: CodeType = frame.f_code
    return code.co_name == "step" and isinstance(frame.f_locals.get("self"), Cell)
