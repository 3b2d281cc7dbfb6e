"""One run of a step on small tensors, under the recorder, and of its gradient."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

from fusecell.cell import Cell, capture_intermediates
from fusecell.compiler.frontend.custom_functions import intercepted
from fusecell.compiler.frontend.dtypes import GRAPH_DTYPES, casts_of
from fusecell.compiler.frontend.isolation import ValueReadGuard
from fusecell.compiler.frontend.prologue_check import check_gradients
from fusecell.compiler.frontend.recorder import Recorder
from fusecell.compiler.frontend.sums_over_rows import as_matrix
from fusecell.compiler.frontend.traced_step import Traced, attributes, input_names
from fusecell.compiler.frontend.traced_values import Row, Sum, Untraceable
from fusecell.compiler.frontend.whole_numbers import INTEGERS
from fusecell.compiler.ir.graph import Builder
from fusecell.compiler.ir.graph_contract import gradient_leaf
from fusecell.compiler.ir.naming import name_values
from fusecell.eager import checked_output
from fusecell.shapes import Shape, feature_shape, is_size, output_shape, packed, size_text
from fusecell.torch_transforms import is_wrapped

__all__ = ["StepRun"]


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
class StepRun:
    """One run of a step, with one number of rows.

    Arguments:
        shapes: of the inputs of a step, without time and batch.
        named: whether the names of the step's variables are taken.
        dtypes: of the inputs, where some are integers.
        draws: whether the step may draw random numbers.
        left: paths of attributes that an earlier run has left behind, and that are not the cell's own.
        orders: of states whose dimensions are in another order in memory, that order.
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
    orders: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    returned_orders: dict[str, tuple[int, ...]] = field(default_factory=dict)
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
            recorder, ValueReadGuard(recorder.may_read, recorder.is_weight), intercepted(recorder.on_apply),
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
        return Traced(
            graph,
            prologue,
            self.dtype,
            self.row_shapes,
            draws,
            output_dtype=self.output_dtype,
            largest_integer=self.recorder.whole_numbers.largest_input,
        )

    def _watched(self) -> AbstractContextManager[None]:
        # Profiling every call costs more than the rest of a small trace: the second run needs no names.
        return _variables_of_steps(self._name_variable) if self.named else nullcontext()

    def _leaf(self, op: str, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        node = self.builder.append(op, (), {"shape": [math.prod(shape)]}, name)
        tensor = self._random((self.rows, *shape), dtype)
        if op == "state" and name in self.orders:
            order = self.orders[name]
            tensor = tensor.permute(order).contiguous().permute([order.index(dim) for dim in range(len(order))])
        if self.gradients and dtype.is_floating_point and not name.startswith("grad."):
            # No leaf of autograd: in place on one torch raises before the recorder can say where.
            tensor = tensor.requires_grad_().clone()
        row = Row(tuple(tensor.shape), node)
        value = self.recorder.writer.truth(row) if dtype == torch.bool else row
        self.recorder.know(tensor, value, fixed=True)
        if dtype in INTEGERS:
            self.recorder.whole_numbers.take_input(tensor)
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
            raise Untraceable(f"The step notes {name} twice; give each note a name of its own.")
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
            if not isinstance(value, Tensor):
                raise Untraceable(f"{name}.step returns {type(value).__name__} as {label}, a tensor is expected.")
            is_dtype = value.dtype == self.dtype
            if label == "output" and value.dtype in (*casts_of(self.dtype), torch.bool, torch.int64):
                self.output_dtype, is_dtype = value.dtype, True
            if tuple(value.shape) != (self.rows, *shape) or not is_dtype:
                actual = f"{tuple(value.shape)} and {value.dtype}"
                remedy = "" if is_dtype else f" Convert it, .to({self.dtype}), or the cell."
                raise Untraceable(
                    f"{label} has shape and dtype {actual}, expected {size_text(shape, 'N')} and {self.dtype}.{remedy}"
                )
            self._note_order(label, value)
            self.outputs[label] = self._node(value)
            self.row_shapes[label] = shape
        return output, after

    def _note_order(self, label: str, value: Tensor) -> None:
        """Note the order in memory of a state: a draw like it goes in that order at the next step."""
        if self.recorder.draws and label.startswith("state.") and not torch.empty_like(value).is_contiguous():
            strides = value.stride()
            order = sorted(range(value.dim()), key=lambda dim: -strides[dim])
            self.returned_orders[label.removeprefix("state.")] = tuple(order)

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
            raise Untraceable("A result has its batch dimension not first; return it transposed, .transpose(0, 1).")
        return Row((self.rows, *row.shape), row.node, 0, row.full_index)

    # the gradient

    def _backward(self, x: list[Tensor], state: list[Tensor], output: Tensor, after: list[Tensor]) -> None:
        recorder, cell = self.recorder, self.cell
        labels = ["grad.output", *map(gradient_leaf, cell.states)]
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
                number = _Seed.apply(seeds, *results)  # type: ignore[no-untyped-call]  # torch's
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
            # What rows were taken from, such as matrices of experts, or the values of a curve at its knots.
            is_table = is_matrix and (len(shape) == 1 or (len(shape) > 2 and math.prod(shape[:-2]) > 1))
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
