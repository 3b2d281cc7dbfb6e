"""``record``: the value of every named intermediate of every cell, at every step, from the compiled loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusecell.cell import Cell, noting
from fusecell.compiler.bound import bound
from fusecell.compiler.graph import Graph, copy, rebuild
from fusecell.compiler.kept import Kept
from fusecell.compiler.kernel import compile_graph
from fusecell.compiler.program import Program, refusal, run_all
from fusecell.compiler.trace import Refusal, trace
from fusecell.eager import run_eager
from fusecell.errors import CompilerError
from fusecell.runner import Options, State, recording, recording_into, register

__all__ = ["Tape", "record"]

_AFTER = "after."


@dataclass(frozen=True)
class _Track:
    """What one cell did in one direction: (T, N, size) tensors by name."""

    kind: str
    direction: int
    values: Mapping[str, Tensor]


class Tape:
    """What :func:`record` recorded: for each leaf cell and direction the values of its intermediates, step by step.

    Attributes:
        outputs: of the layer.
        kinds: the class of each leaf cell, bottom first.
        directions: how many there are of each.
        lengths: (N,), or None where all rows have all steps.
    """

    def __init__(self, tracks: Sequence[_Track], outputs: Tensor | None, lengths: Tensor | None) -> None:
        found = sorted({track.direction for track in tracks})
        self._tracks = [[track for track in tracks if track.direction == direction] for direction in found]
        self.outputs = outputs
        self.lengths = lengths
        self.kinds = tuple(track.kind for track in self._tracks[0])
        self.directions = len(self._tracks)

    def names(self, layer: int = 0) -> tuple[str, ...]:
        """What is known of a cell: what it notes, each of its states after the step, and its output."""
        return tuple(self._track(layer, 0).values)

    def value(self, name: str, layer: int = 0, direction: int = 0) -> Tensor:
        """One intermediate, (T, N, size), in input time for both directions, 0 beyond a row's length.

        Raises:
            KeyError: for a name that the cell has not; it says which it has.
            IndexError: for a layer or direction that there is not.
        """
        values = self._track(layer, direction).values
        if name not in values:
            raise KeyError(f"{self.kinds[layer]} has {', '.join(values)}; no {name!r}.")
        return values[name]

    def saturation(self, name: str, layer: int = 0, direction: int = 0, *, margin: float = 0.1) -> tuple[float, float]:
        """The share of a gate's values within ``margin`` of 0 and of 1, over all valid steps."""
        value = self._valid(self.value(name, layer, direction))
        return (value < margin).double().mean().item(), (value > 1 - margin).double().mean().item()

    def memory_length(self, name: str, layer: int = 0, direction: int = 0) -> Tensor:
        r"""For how many steps each unit remembers, (size,): :math:`1 / (1 - \bar g)`, of the mean of a gate.

        Arguments:
            name: the gate that keeps, ``"z"`` of a GRU, ``"f"`` of an LSTM.
        """
        kept = self._valid(self.value(name, layer, direction)).mean(0)
        return 1 / (1 - kept)

    def norms(self, name: str, layer: int = 0, direction: int = 0) -> Tensor:
        """The Euclidean norm of a value at each step and row, (T, N)."""
        found: Tensor = torch.linalg.vector_norm(self.value(name, layer, direction), dim=-1)
        return found

    def frame(self, name: str, layer: int = 0, direction: int = 0) -> Any:
        """One intermediate as a tidy pandas frame, a line for each valid step, row and unit."""
        import pandas as pd

        value = self.value(name, layer, direction)
        steps, rows, size = value.shape
        t, n, unit = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, value.shape), indexing="ij"))
        table = pd.DataFrame({"step": t, "row": n, "unit": unit, name: value.flatten()})
        kept = self._mask(steps, rows)[..., None].expand(steps, rows, size).flatten()
        return table[kept.numpy()].reset_index(drop=True)

    def save(self, path: str | Path) -> None:
        """Write everything but the layer to a safetensors file; :meth:`load` reads it."""
        from safetensors.torch import save_file

        tensors = {
            f"{direction}/{layer}/{track.kind}/{name}": value.contiguous()
            for direction, tracks in enumerate(self._tracks)
            for layer, track in enumerate(tracks)
            for name, value in track.values.items()
        }
        if self.lengths is not None:
            tensors["lengths"] = self.lengths
        save_file(tensors, path, {"names": "\n".join(tensors)})

    @classmethod
    def load(cls, path: str | Path) -> Tape:
        """A tape that was saved; it has no ``outputs``."""
        from safetensors import safe_open

        found: dict[tuple[int, int, str], dict[str, Tensor]] = {}
        lengths = None
        with safe_open(path, framework="pt") as file:
            for key in file.metadata()["names"].splitlines():
                if key == "lengths":
                    lengths = file.get_tensor(key)
                    continue
                direction, layer, kind, name = key.split("/", 3)
                found.setdefault((int(direction), int(layer), kind), {})[name] = file.get_tensor(key)
        tracks = [_Track(kind, direction, values) for (direction, _, kind), values in sorted(found.items(), key=_place)]
        return cls(tracks, None, lengths)

    def __repr__(self) -> str:
        steps, rows = next(iter(self._tracks[0][0].values.values())).shape[:2]
        lines = [f"Tape of {steps} steps, {rows} rows, {self.directions} direction(s)"]
        for layer, kind in enumerate(self.kinds):
            sizes = ", ".join(f"{name} {value.shape[-1]}" for name, value in self._track(layer, 0).values.items())
            lines.append(f"  {layer} {kind}: {sizes}")
        return "\n".join(lines)

    def _track(self, layer: int, direction: int) -> _Track:
        if not 0 <= direction < self.directions or not 0 <= layer < len(self.kinds):
            raise IndexError(
                f"The tape has {len(self.kinds)} layer(s) and {self.directions} direction(s), got layer {layer}, "
                f"direction {direction}."
            )
        return self._tracks[direction][layer]

    def _mask(self, steps: int, rows: int) -> Tensor:
        if self.lengths is None:
            return torch.ones(steps, rows, dtype=torch.bool)
        return torch.arange(steps)[:, None] < self.lengths

    def _valid(self, value: Tensor) -> Tensor:
        """(valid steps of all rows, size)."""
        return value[self._mask(*value.shape[:2])]


def record(layer: nn.Module, *args: Any, **options: Any) -> Tape:
    """Run a layer and record what happens inside, without gradient.

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
        args, options: what the layer is called with: the input, a state, ``lengths``, ``resets``.

    Returns:
        A :class:`Tape`.

    Raises:
        TypeError: where no cell of fusecell ran inside.
    """
    tracks: list[_Track] = []
    seen: list[Tensor | None] = []

    def keep(cell: Cell, values: dict[str, Tensor], options: Options) -> None:
        tracks.append(_Track(type(cell).__name__, int(options.reverse), values))
        seen[:] = [options.lengths]

    with torch.no_grad(), recording(keep):
        result = layer(*args, **options)
    if not tracks:
        raise TypeError(f"record takes a layer of fusecell, got {type(layer).__name__}, in which no cell ran.")
    return Tape(tracks, result[0] if isinstance(result, tuple) else result, seen[0])


def _run_recorded(cell: Cell, inputs: State, state: State, options: Options) -> tuple[Tensor, State]:
    """The runner inside :func:`record`."""
    program = _programs.find(cell, inputs)
    usual = all(value.is_cpu and value.numel() > 0 for value in (*inputs, *state))
    if isinstance(program, Refusal) or not usual:
        values, after = _loop(cell, inputs, state, options)
    else:
        start: State = ()
        if options.resets is not None:
            like = inputs[0]
            start = cell.initial_state(like.shape[1], dtype=like.dtype, device=like.device)
        weights = program.traced.weights.values(cell)
        values, after = run_all(program.kernel, weights, inputs, state, start, options)
    named = {label.removeprefix("note."): value for label, value in values.items() if label.startswith("note.")}
    named |= {name: values[_AFTER + name] for name in cell.states}
    recording_into()(cell, {**named, "output": values["output"]}, options)
    return values["output"].clone(), after


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
    with noting(note):
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
    outputs |= {_AFTER + name: outputs[f"state.{name}"] for name in cell.states}
    graph: Graph = replace(traced.graph, outputs=outputs)
    try:
        return Program(traced, compile_graph(rebuild(graph, copy(graph))), 0.0)
    except (CompilerError, AssertionError, LookupError) as error:
        return refusal(error)


def _place(item: tuple[tuple[int, int, str], object]) -> tuple[int, int]:
    return item[0][:2]


_programs = Kept(_compile)
register("record", _run_recorded)
