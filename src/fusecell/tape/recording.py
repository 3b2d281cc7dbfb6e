"""``record``: run a layer and return the values of every cell's named intermediates at every step.

A cell is compiled once more, with its notes and new states as further outputs of the loop. With gradients, a zero is
added to each value (``_Probed``): after the backward, the gradient of the zero is the gradient of the value.
"""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fusecell.cell import Cell, capture_intermediates, rewrite_intermediates
from fusecell.cells import CELLS, ZooCell
from fusecell.compiler.dispatch.eligibility import as_numbers, integers_reason
from fusecell.compiler.dispatch.program_cache import ProgramCache
from fusecell.compiler.dispatch.runner import run_auto
from fusecell.compiler.frontend import trace
from fusecell.compiler.ir.graph import Graph, copy, rebuild
from fusecell.compiler.ir.step_boxes import boxes_of
from fusecell.compiler.programs.inference import Program, run_all
from fusecell.compiler.programs.rebind import rebound
from fusecell.compiler.refusal import Refusal, refusal
from fusecell.compiler.runtime.kernel import compile_graph
from fusecell.eager import run_eager
from fusecell.errors import CompilerError
from fusecell.execution.context import recording, recording_into
from fusecell.execution.forked_child import one_thread_after_fork
from fusecell.execution.options import Options, State, steps_of
from fusecell.execution.runners import register
from fusecell.layers.scan_wrappers import unwrapped
from fusecell.shapes import Outputs, feature_shape, in_order, is_size, map_outputs, tensors_of, unpacked
from fusecell.tape.tape import Tape, Track
from fusecell.validation import compute_dtype, first_state, weights_dtype
from fusecell.wrappers import Wrapper

__all__ = ["record"]

_AFTER = "after."
"""Prefix of the outputs that hold new states; the compiler uses "note." for notes and "state." for last states."""


def record(
    layer: nn.Module, *args: Any, labels: Sequence[str] | None = None, gradients: bool = False, **options: Any
) -> Tape:
    """Run a layer and record every cell's named intermediates, states and output at each step.

    A GRU's names are r, z, n, h and output, an LSTM's i, f, g, o, h, c and output; your own cell names a value with
    ``self.note("name", value)`` in its step. Compiled, these are further outputs of the same loop.

    Example:
        >>> import torch, fusecell as fc
        >>> tape = fc.record(fc.GRU(5, 10, num_layers=2), torch.randn(7, 3, 5), lengths=[7, 2, 5])
        >>> tape.names()
        ('r', 'z', 'n', 'h', 'output')
        >>> tape.value("z", layer=1).shape
        torch.Size([7, 3, 10])

    Arguments:
        layer: any layer of fusecell: Recurrent, Bidirectional, Sequential, GRU, LSTM, RNN.
        args, options: the arguments of the layer: the input, a state, ``lengths``, ``resets``, ``mask``.
        labels: a text for each step, such as the characters of a line, for plots and pages.
        gradients: keep the autograd graph: after ``loss(tape.outputs).backward()``, :meth:`Tape.gradient` returns the
            gradient at each value. The backward also adds to the parameters' ``.grad``.

    Returns:
        A :class:`Tape`.

    Raises:
        TypeError: if no cell of fusecell runs in the layer.
        ValueError: if ``labels`` are not one for each step, or the input has no steps or rows.
    """
    tracks: list[Track] = []
    inputs: list[int] = []
    all_lengths: list[Tensor | None] = []

    def add(cell: Cell, values: dict[str, Any], options: Options) -> None:
        inputs.append(values.pop("input"))
        equation, source = _equation(cell), _source(cell)
        kind = type(unwrapped(cell)).__name__
        track = Track(kind, options.reverse, tuple(cell.states), **values, equation=equation, source=source)
        tracks.append(track)
        # The same for all cells of one call: a layer hands its lengths to each.
        all_lengths.append(options.lengths)

    with torch.set_grad_enabled(gradients), recording(add):
        result = layer(*args, **options)
    if not tracks:
        raise TypeError(
            f"record takes a layer of fusecell, got {type(layer).__name__}, in which no cell ran. "
            "Convert torch.nn's GRU, LSTM and RNN with fusecell.replace, and wrap a cell of your own: Recurrent(cell)."
        )
    tape = Tape(_layers(tracks, inputs), result[0] if isinstance(result, tuple) else result, all_lengths[-1], labels)
    if tape.labels is not None and len(tape.labels) != tape.steps:
        raise ValueError(f"record needs one label for each of the {tape.steps} steps, got {len(tape.labels)}.")
    return tape


def _layers(tracks: Sequence[Track], inputs: Sequence[int]) -> list[list[Track]]:
    """Group tracks, in the order in which they ran, into layers of one or two directions.

    Arguments:
        inputs: the address of each track's input.
    """
    # A bidirectional GRU runs layer by layer, forward and reversed in turns; a Bidirectional of two Stacks runs all
    # layers forward, then all reversed. In both, n reversed tracks in a row are the second directions of the n layers
    # before them, if the first of each read the same input tensor.
    layers: list[list[int]] = []
    position = 0
    while position < len(tracks):
        count = _reversed_partners(tracks, inputs, layers, position)
        if count:
            for offset, layer in enumerate(layers[-count:]):
                layer.append(position + offset)
        else:
            layers.append([position])
        position += count or 1
    return [[tracks[index] for index in layer] for layer in layers]


def _reversed_partners(tracks: Sequence[Track], inputs: Sequence[int], layers: list[list[int]], position: int) -> int:
    """Return how many tracks from ``position`` on are the second directions of layers before; 0 if none are."""
    run = 0
    while position + run < len(tracks) and tracks[position + run].reverse:
        run += 1
    for count in range(min(run, len(layers)), 0, -1):
        candidates = layers[-count:]
        forward_only = all(len(layer) == 1 and not tracks[layer[0]].reverse for layer in candidates)
        if forward_only and inputs[candidates[0][0]] == inputs[position]:
            return count
    return 0


@one_thread_after_fork()
def _run_recorded(cell: Cell, inputs: State, state: State, options: Options) -> tuple[Outputs, State]:
    """Run a cell as the runner that :func:`record` puts in force, and hand over what it recorded."""
    reset: State = ()
    if options.resets is not None:
        dtype = state[0].dtype if state else compute_dtype(cell, inputs[0])
        reset = first_state(cell, inputs[0].shape[1], dtype=dtype, device=inputs[0].device)
    # Values first, without gradient; the second run below, with gradients, is the compiled cell that training uses.
    with torch.no_grad():
        raw, after = _values(cell, inputs, state, reset, options)
    notes = [label.removeprefix("note.") for label in raw if label.startswith("note.")]
    names = _names(notes, cell.states)
    values = {name: raw[f"note.{label}"] for label, name in names.items()}
    values |= {name: raw[_AFTER + name] for name in cell.states}
    values |= zip(_output_names(cell), tensors_of(raw["output"]), strict=True)

    def before() -> dict[str, Tensor]:
        pairs = zip(cell.states, state, reset or state, strict=True)
        return {name: _before(values[name], first, begin, options) for name, first, begin in pairs}

    entry: dict[str, Any] = {"values": values, "find_before": before, "probes": {}, "input": inputs[0].data_ptr()}
    # Cloned: the caller may write to the layer's outputs, which must not change the tape.
    outputs = map_outputs(Tensor.clone, raw["output"])
    if torch.is_grad_enabled():
        probes = {name: torch.zeros_like(value, requires_grad=True) for name, value in values.items()}
        probed = _Probed(cell, {**names, **{name: name for name in notes if name in cell.states}}, tuple(probes))
        outputs, after = run_auto(probed, (*inputs, *probes.values()), state, options)
        entry["probes"] = probes
    recording_into()(cell, entry, options)
    return outputs, after


def _values(
    cell: Cell, inputs: State, state: State, reset: State, options: Options
) -> tuple[dict[str, Outputs], State]:
    """Run a cell, compiled where possible; return its outputs, notes and states at each step, and the last state."""
    numbers = as_numbers(inputs, state[0].dtype if state else compute_dtype(cell, inputs[0]))
    if isinstance(numbers, Refusal):
        return _run_loop(cell, inputs, state, options)
    program = _programs.find(cell, inputs, numbers[0].dtype)
    compilable = all(value.is_cpu and value.numel() > 0 for value in (*inputs, *state))
    if isinstance(program, Refusal) or not compilable or integers_reason(inputs, program.traced.largest_integer):
        return _run_loop(cell, inputs, state, options)
    weights, shapes = program.traced.weights.values(cell), program.traced.shapes
    # A state after each step has the shape of the last one.
    shapes = {**shapes, **{_AFTER + name: shapes[f"state.{name}"] for name in cell.states}}
    results, after = run_all(program.kernel, weights, numbers, state, reset, options, shapes)
    raw: dict[str, Outputs] = dict(results)
    outputs = program.traced.graph.outputs
    labels = _output_labels(outputs)
    for name in cell.states:
        if _AFTER + name not in raw:
            value = raw[labels[outputs[f"state.{name}"]]]
            # The same numbers, which the step may return in another shape.
            raw[_AFTER + name] = value.reshape(*value.shape[:2], *shapes[f"state.{name}"])
    raw["output"] = unpacked(cell.output_size, raw["output"], 2)
    return raw, after


def _before(after: Tensor, first: Tensor, reset: Tensor, options: Options) -> Tensor:
    """Compute the state before each step, (T, N, size), from those after.

    Arguments:
        after: (T, N, size).
        first: the state before each row's first step, (N, size).
        reset: the state after a reset, (N, size).
    """
    steps, first = after.shape[0], first.detach()
    # The state before step t is the one after t - 1, or t + 1 in reverse. What the roll wraps around is overwritten: a
    # reversed row starts at its own last valid step.
    before = torch.roll(after, -1 if options.reverse else 1, 0)
    last = torch.full((after.shape[1],), steps) if options.lengths is None else options.lengths
    start = (last - 1).clamp(min=0) if options.reverse else torch.zeros_like(last)
    before[start, torch.arange(after.shape[1])] = first
    if options.resets is not None:
        before = torch.where(_like_rows(options.resets, before), reset.detach(), before)
    if options.lengths is not None:
        valid = torch.arange(steps)[:, None] < options.lengths
        before = torch.where(_like_rows(valid, before), before, torch.zeros_like(before))
    return before


def _like_rows(flags: Tensor, value: Tensor) -> Tensor:
    """Return (T, N) with a dimension of size 1 for each feature dimension of a (T, N, ...) value."""
    return flags.reshape(*flags.shape, *[1] * (value.dim() - 2))


def _output_names(cell: Cell) -> tuple[str, ...]:
    """Name a cell's outputs on the tape: ``output``, or ``output.0`` or ``output.name`` where there are several."""
    size = cell.output_size
    if is_size(size):
        return ("output",)
    return tuple(f"output.{name}" for name in (size if isinstance(size, Mapping) else range(len(size))))


def _names(notes: Sequence[str], states: Sequence[str]) -> dict[str, str]:
    """Map each note's label to its name on the tape, which leaves out the path into wrappers ("cell.cell.") if it can.

    A state that the cell itself notes is left out: it is recorded as a state.
    """
    # Wrappers keep the inner cell in "cell", so a note of a wrapped GRU is "cell.r": the user knows it as r.
    names = {label: label for label in notes if label not in states}
    for label in names:
        short = re.sub(r"^(cell\.)+", "", label)
        if short not in (*names.values(), *states, "output"):
            names[label] = short
    return names


class _Probed(Wrapper):
    """A cell with a zero added to each of its values: the gradient of the zero is that of the value.

    The zeros are further inputs, (T, N, ...) each, so the compiled backward computes their gradients as any input's.

    Arguments:
        notes: the name on the tape of each note, by its path and name.
        probes: the names of the zeros, in the order of the inputs.
    """

    def __init__(self, cell: Cell, notes: Mapping[str, str], probes: Sequence[str]) -> None:
        super().__init__(cell)
        self.notes, self.probes = dict(notes), tuple(probes)

    def noise_names(self) -> tuple[str, ...]:
        return tuple(f"probe.{name}" for name in self.probes)

    def around(self, x: Any, state: State, noise: State) -> tuple[Outputs, State]:
        probes = dict(zip(self.probes, noise, strict=True))
        # By identity: a note comes with the cell that made it, and the same class may be inside twice.
        paths = {id(module): path for path, module in self.cell.named_modules()}

        def add(cell: Cell, name: str, value: Tensor) -> Tensor:
            path = paths.get(id(cell), "")
            return value + probes[self.notes[f"{path}.{name}" if path else name]]

        with rewrite_intermediates(add):
            output, new = self.cell.step(x, state)
        after = []
        for name, value in zip(self.cell.states, new, strict=True):
            # A state that the cell notes has its zero already, added where the rest of the step still uses it.
            probed = value if name in self.notes else value + probes[name]
            # An output that is the new state must depend on the state's zero too.
            output = map_outputs(lambda each, old=value, new=probed: new if each is old else each, output)
            after.append(probed)
        zeros = iter(_output_names(self.cell))
        return map_outputs(lambda each: each + probes[next(zeros)], in_order(self.output_size, output)), tuple(after)


def _equation(cell: Cell) -> str:
    """Return the equations of a cell: those of its class in ``CELLS``, else the formulas of its graph.

    Of several members of ``CELLS`` it is the one whose options are most like the cell's.
    """
    options = tuple((name, getattr(cell, name, None)) for name in ("reset_after", "nonlinearity", "norm"))
    kind: Any = type(cell)
    return _equation_of(kind, options, bool(getattr(cell, "proj_size", 0))) or _formulas(cell)


# Cached, because each lookup builds every member of the class.
@functools.cache
def _equation_of(kind: Any, options: tuple[tuple[str, Any], ...], projected: bool) -> str:
    def matches(member: ZooCell) -> int:
        cell = member.make(3, 3)
        equal: int = sum(getattr(cell, name, None) == value for name, value in options)
        return equal + (bool(getattr(cell, "proj_size", 0)) == projected)

    members = [member for member in CELLS if member.cell is kind]
    return max(members, key=matches).equation if members else ""


def _formulas(cell: Cell) -> str:
    """Return how the step's variables are computed from one another, by its graph; "" if it can't be traced."""
    if len(cell.inputs) != 1:
        return ""
    traced = trace(cell, [feature_shape(cell.input_size)], weights_dtype(cell) or torch.float32, gradients=False)
    if isinstance(traced, Refusal):
        return ""
    boxes = [box for box in boxes_of(traced.graph) if box.formula and box.formula not in box.sources]
    return "; ".join(f"{box.name} = {box.formula}" for box in boxes)


def _source(cell: Cell) -> str:
    """Return the Python source of a cell's step; for a wrapper, that of the innermost cell, which holds the maths."""
    while isinstance(cell, Wrapper):
        cell = cell.cell
    kind: Any = type(cell)  # mypy finds no hash in a module's class
    return _source_of(kind)


@functools.cache
def _source_of(kind: Any) -> str:
    try:
        return textwrap.dedent(inspect.getsource(kind.step))
    except (OSError, TypeError):  # a cell of an interactive session
        return ""


def _run_loop(cell: Cell, inputs: State, state: State, options: Options) -> tuple[dict[str, Outputs], State]:
    """Do the same as :func:`_values` with the Python loop, for cells that can't be compiled."""
    if any(0 in value.shape for value in inputs):
        raise ValueError("record needs a step and a row at least: the input has a dimension of size 0.")
    steps: dict[str, list[Tensor]] = {}

    def note(_: Cell, name: str, value: Tensor) -> None:
        steps.setdefault(f"note.{name}", []).append(value)

    def step(x: Any, state: State) -> tuple[Outputs, State]:
        output, after = cell.step(x, state)
        for name, value in zip(cell.states, after, strict=True):
            steps.setdefault(_AFTER + name, []).append(value)
        return output, after

    # A copy, because an attribute "step" on the user's cell would be seen by other threads.
    watched = rebound(cell, {}, ())
    watched.__dict__["step"] = step
    with capture_intermediates(note):
        outputs, after = run_eager(watched, inputs, state, options)
    # A reversed loop appends the last step first; values are in input time.
    values = {name: torch.stack(each[::-1] if options.reverse else each) for name, each in steps.items()}
    if options.lengths is not None:
        lengths = options.lengths
        valid = torch.arange(steps_of(inputs), device=lengths.device)[:, None] < lengths
        values = {
            name: torch.where(_like_rows(valid, value), value, torch.zeros_like(value))
            for name, value in values.items()
        }
    return {**values, "output": outputs}, after


def _compile(
    cell: Cell,
    features: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    dtypes: Sequence[torch.dtype] | None = None,
) -> Program | Refusal:
    """Compile a cell's step with its notes and new states as further outputs."""
    traced = trace(cell, features, dtype, gradients=False, dtypes=dtypes)
    if isinstance(traced, Refusal):
        return traced
    outputs = dict(traced.graph.outputs)
    labels = _output_labels(outputs)
    # A state that is also the output or a note is written once; _values reads it from there.
    outputs |= {
        _AFTER + name: outputs[f"state.{name}"] for name in cell.states if outputs[f"state.{name}"] not in labels
    }
    graph: Graph = replace(traced.graph, outputs=outputs)
    try:
        return Program(
            traced, compile_graph(rebuild(graph, copy(graph)), about=f"{type(cell).__name__}, recorded"), 0.0
        )
    except (CompilerError, AssertionError, LookupError) as error:
        return refusal(error)


def _output_labels(outputs: Mapping[str, int]) -> dict[int, str]:
    """Return the label of each node that is an output over all steps: the output itself or a note."""
    return {index: label for label, index in outputs.items() if not label.startswith("state.")}


_programs = ProgramCache(_compile)
register("record", _run_recorded)
