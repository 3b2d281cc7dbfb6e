"""``record``: the value of every named intermediate of every cell, at every step, from the compiled loop."""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fusecell.cell import Cell, capture_intermediates, rewrite_intermediates
from fusecell.cells import CELLS, ZooCell
from fusecell.compiler.dispatch.program_cache import ProgramCache
from fusecell.compiler.dispatch.runner import run_auto
from fusecell.compiler.frontend import trace
from fusecell.compiler.ir.graph import Graph, copy, rebuild
from fusecell.compiler.programs.inference import Program, run_all
from fusecell.compiler.programs.rebind import bound
from fusecell.compiler.refusal import Refusal, refusal
from fusecell.compiler.runtime.kernel import compile_graph
from fusecell.eager import run_eager
from fusecell.errors import CompilerError
from fusecell.execution.context import recording, recording_into
from fusecell.execution.forked_child import one_thread_after_fork
from fusecell.execution.options import Options, State
from fusecell.execution.runners import register
from fusecell.layers.scan_wrappers import unwrapped
from fusecell.tape.tape import Tape, Track
from fusecell.validation import first_state
from fusecell.wrappers import Wrapper

__all__ = ["record"]

_AFTER = "after."


def record(
    layer: nn.Module, *args: Any, labels: Sequence[str] | None = None, gradients: bool = False, **options: Any
) -> Tape:
    """Run a layer and record what happens inside.

    A GRU's names are r, z, n, h and output, an LSTM's i, f, g, o, h, c and output; a cell of your own names values with
    ``self.note("name", value)`` in its step. Compiled, they are further outputs of the same loop.

    Example:
        >>> import torch, fusecell as fc
        >>> tape = fc.record(fc.GRU(5, 10, num_layers=2), torch.randn(7, 3, 5), lengths=[7, 2, 5])
        >>> tape.names()
        ('r', 'z', 'n', 'h', 'output')
        >>> tape.value("z", layer=1).shape
        torch.Size([7, 3, 10])

    Arguments:
        layer: any layer of fusecell: Recurrent, Bidirectional, Sequential, GRU, LSTM, RNN.
        args, options: what the layer is called with: the input, a state, ``lengths``, ``resets``, ``mask``.
        labels: a word for each step, such as the characters of a text, for plots and pages.
        gradients: keep the graph, so that after ``loss(tape.outputs).backward()`` the tape has the gradient of each
            value beside it. The backward adds to the parameters' gradients, as any does.

    Returns:
        A :class:`Tape`.

    Raises:
        TypeError: where no cell of fusecell ran inside.
    """
    tracks: list[Track] = []
    inputs: list[int] = []
    seen: list[Tensor | None] = []

    def keep(cell: Cell, found: dict[str, Any], options: Options) -> None:
        inputs.append(found.pop("input"))
        equation, source = _equation(cell), _source(cell)
        kind = type(unwrapped(cell)).__name__
        track = Track(kind, options.reverse, tuple(cell.states), **found, equation=equation, source=source)
        tracks.append(track)
        seen[:] = [options.lengths]

    with torch.set_grad_enabled(gradients), recording(keep):
        result = layer(*args, **options)
    if not tracks:
        raise TypeError(f"record takes a layer of fusecell, got {type(layer).__name__}, in which no cell ran.")
    tape = Tape(_layers(tracks, inputs), result[0] if isinstance(result, tuple) else result, seen[0], labels)
    if tape.labels is not None and len(tape.labels) != tape.steps:
        raise ValueError(f"labels must be one for each of the {tape.steps} steps, got {len(tape.labels)}.")
    return tape


def _layers(tracks: Sequence[Track], inputs: Sequence[int]) -> list[list[Track]]:
    """The tracks of each layer: one, or two where the second ran reversed over the same input.

    Directions come cell by cell (a GRU's) or one after the other (those of two stacks): a run of reversed tracks
    belongs to as many layers before it, if it began with their input.
    """
    layers: list[list[int]] = []
    place = 0
    while place < len(tracks):
        count = _partners(tracks, inputs, layers, place)
        if count:
            for offset, layer in enumerate(layers[-count:]):
                layer.append(place + offset)
        else:
            layers.append([place])
        place += count or 1
    return [[tracks[index] for index in layer] for layer in layers]


def _partners(tracks: Sequence[Track], inputs: Sequence[int], layers: list[list[int]], place: int) -> int:
    """How many tracks from ``place`` on are the other direction of as many layers before it."""
    reversed_ = 0
    while place + reversed_ < len(tracks) and tracks[place + reversed_].reverse:
        reversed_ += 1
    for count in range(min(reversed_, len(layers)), 0, -1):
        ahead = layers[-count:]
        alone = all(len(layer) == 1 and not tracks[layer[0]].reverse for layer in ahead)
        if alone and inputs[ahead[0][0]] == inputs[place]:
            return count
    return 0


@one_thread_after_fork()
def _run_recorded(cell: Cell, inputs: State, state: State, options: Options) -> tuple[Tensor, State]:
    """The runner inside :func:`record`."""
    begin: State = ()
    if options.resets is not None:
        begin = first_state(cell, inputs[0].shape[1], dtype=inputs[0].dtype, device=inputs[0].device)
    with torch.no_grad():
        raw, after = _values(cell, inputs, state, begin, options)
    notes = [label.removeprefix("note.") for label in raw if label.startswith("note.")]
    names = _names(notes, cell.states)
    values = {name: raw[f"note.{label}"] for label, name in names.items()}
    values |= {name: raw[_AFTER + name] for name in cell.states} | {"output": raw["output"]}

    def before() -> dict[str, Tensor]:
        return {name: _before(values[name], *pair, options) for name, pair in _pairs(cell.states, state, begin)}

    found: dict[str, Any] = {"values": values, "find_before": before, "probes": {}, "input": inputs[0].data_ptr()}
    outputs = raw["output"].clone()
    if torch.is_grad_enabled():
        probes = {name: torch.zeros_like(value, requires_grad=True) for name, value in values.items()}
        probed = _Probed(cell, {**names, **{name: name for name in notes if name in cell.states}}, tuple(probes))
        outputs, after = run_auto(probed, (*inputs, *probes.values()), state, options)
        found["probes"] = probes
    recording_into()(cell, found, options)
    return outputs, after


def _values(cell: Cell, inputs: State, state: State, begin: State, options: Options) -> tuple[dict[str, Tensor], State]:
    """All that is known of a cell at each step, compiled where it can be."""
    program = _programs.find(cell, inputs)
    usual = all(value.is_cpu and value.numel() > 0 for value in (*inputs, *state))
    if isinstance(program, Refusal) or not usual:
        return _loop(cell, inputs, state, options)
    raw, after = run_all(program.kernel, program.traced.weights.values(cell), inputs, state, begin, options)
    outputs = program.traced.graph.outputs
    shown = _shown(outputs)
    for name in cell.states:
        if _AFTER + name not in raw:
            raw[_AFTER + name] = raw[shown[outputs[f"state.{name}"]]]
    return raw, after


def _pairs(names: Sequence[str], state: State, begin: State) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    return zip(names, zip(state, begin or state, strict=True), strict=True)


def _before(after: Tensor, first: Tensor, begin: Tensor, options: Options) -> Tensor:
    """The state that each step began with, (T, N, size)."""
    steps, first = after.shape[0], first.detach()
    found = torch.roll(after, -1 if options.reverse else 1, 0)
    last = torch.full((after.shape[1],), steps) if options.lengths is None else options.lengths
    place = (last - 1).clamp(min=0) if options.reverse else torch.zeros_like(last)
    found[place, torch.arange(after.shape[1])] = first
    if options.resets is not None:
        found = torch.where(options.resets[..., None], begin.detach(), found)
    if options.lengths is not None:
        valid = torch.arange(steps)[:, None] < options.lengths
        found = torch.where(valid[..., None], found, torch.zeros_like(found))
    return found


def _names(notes: Sequence[str], states: Sequence[str]) -> dict[str, str]:
    """What each note is called: as the cell says, without the path to a cell in a wrapper where that is clear.

    A state that the cell itself notes is left out: it stands among the states.
    """
    found = {label: label for label in notes if label not in states}
    for label in found:
        short = re.sub(r"^(cell\.)+", "", label)
        if short not in (*found.values(), *states, "output"):
            found[label] = short
    return found


class _Probed(Wrapper):
    """A cell with a zero added to each of its values: the gradient of a zero is that of the value.

    Arguments:
        notes: for the path and name of each note, what it is called.
        probes: what the zeros are called, in the order of the inputs that hold them.
    """

    def __init__(self, cell: Cell, notes: Mapping[str, str], probes: Sequence[str]) -> None:
        super().__init__(cell)
        self.notes, self.probes = dict(notes), tuple(probes)

    def noise_names(self) -> tuple[str, ...]:
        return tuple(f"probe.{name}" for name in self.probes)

    def around(self, x: Any, state: State, noise: State) -> tuple[Tensor, State]:
        probes = dict(zip(self.probes, noise, strict=True))
        paths = {id(module): path for path, module in self.cell.named_modules()}

        def add(cell: Cell, name: str, value: Tensor) -> Tensor:
            path = paths.get(id(cell), "")
            return value + probes[self.notes[f"{path}.{name}" if path else name]]

        with rewrite_intermediates(add):
            output, new = self.cell.step(x, state)
        after = []
        for name, value in zip(self.cell.states, new, strict=True):
            moved = value if name in self.notes else value + probes[name]
            output = moved if output is value else output
            after.append(moved)
        return output + probes["output"], tuple(after)


def _equation(cell: Cell) -> str:
    """The step as the zoo writes it: of the member that is most alike, among those of the cell's class."""
    facts = tuple((name, getattr(cell, name, None)) for name in ("reset_after", "nonlinearity", "norm"))
    kind: Any = type(cell)
    return _equation_of(kind, facts, bool(getattr(cell, "proj_size", 0)))


@functools.cache
def _equation_of(kind: Any, facts: tuple[tuple[str, Any], ...], projected: bool) -> str:
    def alike(member: ZooCell) -> int:
        made = member.make(3, 3)
        same: int = sum(getattr(made, name, None) == value for name, value in facts)
        return same + (bool(getattr(made, "proj_size", 0)) == projected)

    members = [member for member in CELLS if member.cell is kind]
    return max(members, key=alike).equation if members else ""


def _source(cell: Cell) -> str:
    """The step as Python; of a wrapper, that of the cell inside, which says more."""
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


def _loop(cell: Cell, inputs: State, state: State, options: Options) -> tuple[dict[str, Tensor], State]:
    """The same from the Python loop, for cells that can't be compiled."""
    if any(0 in value.shape for value in inputs):
        raise ValueError("record needs a step and a row at least: of none there is nothing to see.")
    found: dict[str, list[Tensor]] = {}

    def note(_: Cell, name: str, value: Tensor) -> None:
        found.setdefault(f"note.{name}", []).append(value)

    def step(x: Any, state: State) -> tuple[Tensor, State]:
        output, after = cell.step(x, state)
        for name, value in zip(cell.states, after, strict=True):
            found.setdefault(_AFTER + name, []).append(value)
        return output, after

    watched = bound(cell, {}, ())
    watched.__dict__["step"] = step
    with capture_intermediates(note):
        outputs, after = run_eager(watched, inputs, state, options)
    values = {name: torch.stack(each[::-1] if options.reverse else each) for name, each in found.items()}
    if options.lengths is not None:
        valid = torch.arange(outputs.shape[0], device=outputs.device)[:, None, None] < options.lengths[:, None]
        values = {name: torch.where(valid, value, torch.zeros_like(value)) for name, value in values.items()}
    return {**values, "output": outputs}, after


def _compile(cell: Cell, features: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Program | Refusal:
    """A program with notes and states as further outputs."""
    traced = trace(cell, features, dtype, gradients=False)
    if isinstance(traced, Refusal):
        return traced
    outputs = dict(traced.graph.outputs)
    shown = _shown(outputs)
    outputs |= {
        _AFTER + name: outputs[f"state.{name}"] for name in cell.states if outputs[f"state.{name}"] not in shown
    }
    graph: Graph = replace(traced.graph, outputs=outputs)
    try:
        return Program(
            traced, compile_graph(rebuild(graph, copy(graph)), about=f"{type(cell).__name__}, recorded"), 0.0
        )
    except (CompilerError, AssertionError, LookupError) as error:
        return refusal(error)


def _shown(outputs: Mapping[str, int]) -> dict[int, str]:
    """What stands in an output anyway: a state that is the output, or record_intermediate, needn't be written twice."""
    return {index: label for label, index in outputs.items() if not label.startswith("state.")}


_programs = ProgramCache(_compile)
register("record", _run_recorded)
