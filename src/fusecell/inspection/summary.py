"""``summary``: cell calls, parameters, multiply-accumulates, shapes and training memory of a layer."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.cell_tree import HasCells
from fusecell.compiler.dispatch.runner import find_trainable
from fusecell.compiler.frontend.dtypes import COMPILED_DTYPES, kernel_dtype
from fusecell.compiler.programs.chunked import chunk_steps
from fusecell.compiler.refusal import Refusal
from fusecell.execution.context import recomputing
from fusecell.execution.options import Recompute, State
from fusecell.inspection.mac_counter import count_macs
from fusecell.inspection.recurrent_parts import named_recurrent_parts
from fusecell.layers import Bidirectional, Recurrent, Sequential
from fusecell.shapes import Size, feature_shape, output_shape
from fusecell.validation import first_weight

__all__ = ["LayerSummary", "Summary", "count_cells", "summary"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """One line of a :class:`Summary`: a cell run over the sequence, or a module applied to every step.

    Arguments:
        name: the path to it in the layer.
        kind: its class; ``GRU layer`` for one layer and direction of a :class:`torch.nn.GRU`.
        parameters: the number of its parameters' elements.
        macs: multiply-accumulates of its matrix products over all steps and rows; None for a cell with several inputs,
            whose shapes are unknown here.
        output: the shape of its output.
        states: the shape of each of its states by name.
        calls: how often its ``step`` is called; 0 for a module that is no cell.
        saved: bytes saved for the backward in training, without its output; None where it isn't compiled.
        saved_with: what ``saved`` would be with each value of ``recompute``; empty where it isn't compiled.
    """

    name: str
    kind: str
    parameters: int
    macs: int | None
    output: Shape
    states: dict[str, Shape]
    calls: int
    saved: int | None = None
    saved_with: Mapping[Recompute, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Summary:
    """The layers of a model with their totals; ``str()`` is a table."""

    layers: tuple[LayerSummary, ...]
    seq_len: int
    batch_size: int
    parameters: int

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of all layers; None if a layer's can't be counted."""
        each = [layer.macs for layer in self.layers]
        return None if None in each else sum(cast("list[int]", each))

    @property
    def saved(self) -> int:
        """Bytes saved between forward and backward in training, of all layers that are compiled."""
        return sum(layer.saved or 0 for layer in self.layers)

    def saved_with(self, recompute: Recompute) -> int:
        """Return what :attr:`saved` would be with a value of ``recompute`` for all layers: True, False or "chunk"."""
        return sum(layer.saved_with.get(recompute, 0) for layer in self.layers)

    @property
    def calls(self) -> int:
        """Cell calls of all layers, as :func:`count_cells` counts them."""
        return sum(layer.calls for layer in self.layers)

    def table(self) -> list[tuple[str, ...]]:
        """Return the table as rows of text: a header, a row per layer, the totals."""
        header = ("layer", "kind", "parameters", "MACs", "cell calls", "bytes saved for backward", "output", "state")
        rows = [
            (
                layer.name,
                layer.kind,
                f"{layer.parameters:,}",
                _count(layer.macs),
                f"{layer.calls:,}" if layer.calls else "",
                "" if layer.saved is None else f"{layer.saved:,}",
                str(layer.output),
                " ".join(f"{name} {shape}" for name, shape in layer.states.items()),
            )
            for layer in self.layers
        ]
        total = (f"T={self.seq_len} N={self.batch_size}", "total", f"{self.parameters:,}", _count(self.macs))
        return [header, *rows, (*total, f"{self.calls:,}", f"{self.saved:,}", "", "")]

    def __str__(self) -> str:
        table = self.table()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(_aligned(*cell) for cell in zip(row, widths, _NUMBERS, strict=True)) for row in table]
        rule = "-" * max(map(len, lines))
        return "\n".join(line.rstrip() for line in (lines[0], rule, *lines[1:-1], rule, lines[-1], *self._advice()))

    def _advice(self) -> Iterator[str]:
        """Say how to save less, where it is much."""
        options: tuple[Recompute, ...] = (True, "chunk")
        less = [f"{self.saved_with(each):,} with recompute={each!r}" for each in options]
        if self.saved > _MUCH_SAVED and self.saved_with("chunk") < self.saved:
            yield f"saved for the backward: {self.saved:,} bytes; {', '.join(less)}"

    def _repr_html_(self) -> str:
        header, *rows = self.table()
        head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
        body = "".join(
            "<tr>"
            + "".join(
                f'<td style="text-align:{"right" if number else "left"}">{html.escape(text)}</td>'
                for text, number in zip(row, _NUMBERS, strict=True)
            )
            + "</tr>"
            for row in rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_MUCH_SAVED = 64 << 20
_NUMBERS = (False, False, True, True, True, True, False, False)


def count_cells(layer: nn.Module, seq_len: int) -> int:
    """Count how often a cell's step is called for one sequence: seq_len x directions x layers.

    Example:
        >>> import fusecell as fc
        >>> fc.count_cells(fc.GRU(5, 10, num_layers=2, bidirectional=True), seq_len=35)
        140
        >>> fc.count_cells(fc.Recurrent(fc.Stack(fc.GRUCell(5, 8), fc.Stack(fc.LSTMCell(8, 8), fc.RNNCell(8, 8)))), 35)
        105

    Arguments:
        layer: a cell, a layer (torch.nn's too), or any module that contains some.
        seq_len: steps of the sequence.

    Raises:
        TypeError: if seq_len is not an integer.
        ValueError: if it is negative.
    """
    return _integer("seq_len", seq_len, 0) * _cells_per_step(layer)


def _cells_per_step(module: nn.Module) -> int:
    """Count the cell calls of one time step; a wrapper with its inner cell is one call."""
    calls = 0
    for _, part in named_recurrent_parts(module):
        calls += part.num_layers * (2 if part.bidirectional else 1) if isinstance(part, nn.RNNBase) else 1
    return calls


def summary(layer: nn.Module, seq_len: int, batch_size: int = 1) -> Summary:
    """Count a layer's parameters, and the operations and the memory of one pass over a sequence.

    Multiply-accumulates are those of matrix products, counted by running each cell's step once; pointwise arithmetic is
    left out, as is usual. A GRU has 3H(I + H) per step and row.

    Example:
        >>> import fusecell as fc
        >>> totals = fc.summary(fc.Recurrent(fc.GRUCell(5, 10)), seq_len=35, batch_size=3)
        >>> totals.parameters, totals.macs == 35 * 3 * (3 * 10 * (5 + 10)), totals.calls
        (510, True, 35)
        >>> totals.saved == 35 * 3 * 5 * 16 * 4  # 5 float32 numbers per unit, the 10 units padded to a vector of 16
        True

    Arguments:
        layer: a cell, Recurrent, Bidirectional, Sequential, a drop-in layer or one of torch.nn's recurrent layers.
        seq_len: steps of the sequence.
        batch_size: rows of the batch.

    Returns:
        A :class:`Summary`: ``print`` it, show it in a notebook, or read its ``layers``.

    Raises:
        TypeError: for a module that is none of these.
        ValueError: for a seq_len that is negative, a batch_size below 1, or a Sequential that has no input size.
    """
    walk = _Walk(_integer("seq_len", seq_len, 0), _integer("batch_size", batch_size, 1))
    # Cells draw noise here: fork_rng leaves the user's random numbers as they were. Inference mode is off because what
    # is compiled here serves later calls too.
    with torch.random.fork_rng(devices=()), torch.inference_mode(False), torch.no_grad():
        layers, _ = walk.describe(layer)
    return Summary(tuple(layers), seq_len, batch_size, _parameters(layer))


@dataclass(frozen=True, slots=True)
class _Walk:
    """Describe the parts of a layer for one shape of input."""

    seq_len: int
    rows: int
    batch_first: bool = False
    recompute: Recompute = False

    def describe(self, module: nn.Module, name: str = "") -> tuple[list[LayerSummary], Size]:
        """Describe the parts of a module; return them and the features of its output."""
        if isinstance(module, Sequential):
            return self._sequential(module, name)
        if isinstance(module, Recurrent):
            return self._recurrent(module, name, reverse=module.reverse), module.output_size
        if isinstance(module, Bidirectional):
            rows = self._recurrent(module.forward_layer, _join(name, "forward_layer"))
            rows += self._recurrent(module.backward_layer, _join(name, "backward_layer"), reverse=True)
            return rows, module.output_size
        if isinstance(module, nn.RNNBase):
            recompute = getattr(module, "recompute", False)
            return replace(self, batch_first=module.batch_first, recompute=recompute)._torch_layers(module, name)
        if isinstance(module, Cell):
            return self._cells(module, name), module.output_size
        if isinstance(module, nn.RNNCellBase):
            return [self._torch_cell(module, name)], module.hidden_size
        raise TypeError(
            f"summary takes a cell or a recurrent layer, got {type(module).__name__}. "
            "Of a model of your own, pass its recurrent part, or put the parts into a fusecell.Sequential."
        )

    def _recurrent(self, layer: Recurrent, name: str, *, reverse: bool = False) -> list[LayerSummary]:
        walk = replace(self, batch_first=layer.batch_first, recompute=layer.recompute)
        return walk._cells(layer.cell, _join(name, "cell"), " reverse" if reverse else "")

    def _sequential(self, module: Sequential, name: str) -> tuple[list[LayerSummary], Size]:
        walk = replace(self, batch_first=any(getattr(part, "batch_first", False) for part in module))
        rows: list[LayerSummary] = []
        features = _input_size(module)
        # Not named_children(): that leaves out a module's second appearance.
        for label, part in module._modules.items():
            if part is None:
                continue
            if _cells_per_step(part):
                lines, features = walk.describe(part, _join(name, label))
                rows += lines
            else:
                rows.append(walk._per_step(part, _join(name, label), features, _like(module)))
                features = rows[-1].output[2:]
        return rows, features

    def _per_step(self, module: nn.Module, name: str, features: Size, like: dict[str, Any]) -> LayerSummary:
        """Describe a module that is applied to each step independently, such as a Linear."""
        if isinstance(module, nn.Embedding):
            x = torch.zeros(1, self.rows, dtype=torch.int64, device=like["device"])
        else:
            x = torch.zeros((1, self.rows, *feature_shape(features)), **like)
        # One step stands for all: such a module sees no other step.
        macs, output = count_macs(module, x)
        shape = self._sequence(*output.shape[2:])
        return LayerSummary(name, type(module).__name__, _parameters(module), macs * self.seq_len, shape, {}, 0)

    def _cells(self, cell: Cell, name: str, suffix: str = "") -> list[LayerSummary]:
        """Describe a cell, or each cell of a Stack."""
        parts = named_recurrent_parts(cell, name)
        return [self._cell(part, path, suffix) for path, part in parts if isinstance(part, Cell)]

    def _cell(self, cell: Cell, name: str, suffix: str) -> LayerSummary:
        states: dict[str, Shape] = {
            state: (self.rows, *feature_shape(size)) for state, size in zip(cell.states, cell.state_sizes, strict=True)
        }
        macs = self._step_macs(cell)
        total = None if macs is None else macs * self.seq_len
        kind, shape = type(cell).__name__ + suffix, self._sequence(*output_shape(cell.output_size))
        return self._with_saved(LayerSummary(name, kind, _parameters(cell), total, shape, states, self.seq_len), cell)

    def _with_saved(self, line: LayerSummary, cell: Cell) -> LayerSummary:
        """Add the bytes that training a cell saves."""
        saved = self._saved(cell)
        return replace(line, saved=saved.get(self.recompute or recomputing()), saved_with=saved)

    def _saved(self, cell: Cell) -> dict[Recompute, int]:
        """Return the bytes saved for the gradients of all parameters, by recompute; {} if it can't be compiled."""
        like = _like(cell)
        drawn = cell.draw(1, self.rows, **like)
        # The widths of further inputs are unknown before a call, and other dtypes are never compiled.
        if len(cell.inputs) > 1 + len(drawn) or like["dtype"] not in COMPILED_DTYPES:
            return {}
        inputs = (torch.zeros((1, self.rows, *feature_shape(cell.input_size)), **like), *drawn)
        with torch.enable_grad():
            trainable = find_trainable(cell, inputs)
            if isinstance(trainable, Refusal):  # of token ids it may compile
                trainable = find_trainable(cell, (inputs[0].long(), *drawn), like["dtype"])
            if isinstance(trainable, Refusal):
                return {}
            flags = [False] * len(inputs)
            all_numbers, of_states = (trainable.saved_numbers(cell, flags, recompute) for recompute in (False, True))
        row = kernel_dtype(like["dtype"]).itemsize * self.rows
        chunk = chunk_steps(self.seq_len)
        starts = math.ceil(self.seq_len / chunk) * sum(math.prod(feature_shape(size)) for size in cell.state_sizes)
        return {
            False: all_numbers * row * self.seq_len,
            True: of_states * row * self.seq_len,
            "chunk": (all_numbers * min(chunk, self.seq_len) + starts) * row,
        }

    def _step_macs(self, cell: Cell) -> int | None:
        """Return the multiply-accumulates of one step; None for a cell with several inputs."""
        like = _like(cell)
        drawn = cell.draw(1, self.rows, **like)
        if len(cell.inputs) > 1 + len(drawn):
            return None
        first = torch.zeros((self.rows, *feature_shape(cell.input_size)), **like)
        try:
            return self._macs(cell, (first, *(value[0] for value in drawn)))
        except (RuntimeError, TypeError, IndexError):  # a cell of token ids takes no other numbers
            return self._macs(cell, (first.long(), *(value[0] for value in drawn)))

    def _macs(self, cell: Cell, inputs: State) -> int:
        """Return the multiply-accumulates of one step on these inputs."""
        x = inputs if len(inputs) > 1 else inputs[0]
        return count_macs(cell.step, x, cell.initial_state(self.rows, **_like(cell)))[0]

    def _torch_layers(self, module: nn.RNNBase, name: str) -> tuple[list[LayerSummary], Size]:
        """Describe each layer and direction of a torch.nn layer or a drop-in."""
        width = module.proj_size or module.hidden_size
        states: dict[str, Shape] = {"h": (self.rows, width)}
        if module.mode == "LSTM":
            states["c"] = (self.rows, module.hidden_size)
        directions = ("", "_reverse") if module.bidirectional else ("",)
        rows = []
        for suffix in (f"l{layer}{direction}" for layer in range(module.num_layers) for direction in directions):
            names = [f"{kind}_{suffix}" for kind in _WEIGHTS if hasattr(module, f"{kind}_{suffix}")]
            tensors = [getattr(module, weight) for weight in names]
            kind = f"{type(module).__name__} layer"
            rows.append(self._of_weights(_join(name, suffix), kind, tensors, self._sequence(width), states))
        if isinstance(module, HasCells):
            cells = module.leaf_cells()
            rows = [self._with_saved(row, cell) for row, (_, _, cell) in zip(rows, cells, strict=True)]
        return rows, width * len(directions)

    def _torch_cell(self, cell: nn.RNNCellBase, name: str) -> LayerSummary:
        states: dict[str, Shape] = {"h": (self.rows, cell.hidden_size)}
        if isinstance(cell, nn.LSTMCell):
            states["c"] = (self.rows, cell.hidden_size)
        tensors = [value for value in (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh) if value is not None]
        return self._of_weights(name, type(cell).__name__, tensors, self._sequence(cell.hidden_size), states)

    def _of_weights(
        self, name: str, kind: str, tensors: Sequence[Tensor], output: Shape, states: dict[str, Shape]
    ) -> LayerSummary:
        """Describe one of torch.nn's cells or layers, which uses each weight matrix in one product per step and row."""
        macs = sum(value.numel() for value in tensors if value.dim() == 2) * self.seq_len * self.rows
        return LayerSummary(name, kind, sum(value.numel() for value in tensors), macs, output, states, self.seq_len)

    def _sequence(self, *features: int) -> Shape:
        leading = (self.rows, self.seq_len) if self.batch_first else (self.seq_len, self.rows)
        return (*leading, *features)


_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


def _parameters(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def _like(module: nn.Module) -> dict[str, Any]:
    """Return the dtype and device of a module's weights, else of its buffers."""
    weight = first_weight(module)
    if weight is None:
        weight = next((value for value in module.buffers() if value.is_floating_point()), None)
    if weight is not None:
        return {"dtype": weight.dtype, "device": weight.device}
    return {"dtype": torch.get_default_dtype(), "device": torch.device("cpu")}


def _input_size(module: Sequential) -> Size:
    """Return the features a Sequential takes: those of the first part that declares them.

    The parts before it, activations and norms, don't change the number of features.
    """
    for part in module:
        for attribute in ("input_size", "in_features", "embedding_dim"):
            size = getattr(part, attribute, None)
            if isinstance(size, int | tuple):
                return size
        if isinstance(part, Sequential):
            return _input_size(part)
    raise ValueError(
        "summary: no part of this Sequential has an input_size, in_features or embedding_dim, so the features of its "
        "input are unknown. Pass the recurrent part alone."
    )


def _join(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _count(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _aligned(text: str, width: int, number: bool) -> str:
    return text.rjust(width) if number else text.ljust(width)


def _integer(name: str, value: int, least: int) -> int:
    """Return ``value``, or raise TypeError or ValueError unless it is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")
    return value
