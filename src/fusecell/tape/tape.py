"""``Tape``: recorded values by layer, direction and name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusecell.errors import TapeFileError
from fusecell.tape.file import FORMAT, read
from fusecell.tape.track import Track
from fusecell.tensor_file import FILE_BYTES

__all__ = ["Tape", "Track"]


class Tape:
    """The values of every intermediate of every cell of a layer, step by step; :func:`record` makes one.

    Example:
        >>> import torch, fusecell as fc
        >>> tape = fc.record(fc.GRU(5, 10), torch.randn(7, 3, 5))
        >>> tape.steps, tape.rows, tape.kinds
        (7, 3, ('GRUCell',))
        >>> tape.value("z").shape
        torch.Size([7, 3, 10])

    Attributes:
        outputs: the layer's outputs; None for a tape that was loaded.
        kinds: the class name of each cell, bottom first.
        directions: 2 if a cell ran over the sequence in both directions, else 1.
        lengths: int64 (N,), the valid steps of each row; None if all rows have all steps.
        labels: a text for each step, or None.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[Track]],
        outputs: Tensor | None,
        lengths: Tensor | None,
        labels: Sequence[str] | None = None,
    ) -> None:
        self._layers = [tuple(tracks) for tracks in layers]
        self.outputs = outputs
        self.lengths = lengths
        self.labels = None if labels is None else tuple(labels)
        self.kinds = tuple(tracks[0].kind for tracks in self._layers)
        self.directions = max(map(len, self._layers))

    def names(self, layer: int = 0) -> tuple[str, ...]:
        """Return the names of a cell's recorded values: its notes, its states after the step, and "output"."""
        return tuple(self.track(layer, 0).values)

    def value(self, name: str, layer: int = 0, direction: int = 0) -> Tensor:
        """Return the values of one intermediate, (T, N, size); 0 beyond a row's length.

        Index t belongs to the input at step t, in both directions.

        Raises:
            KeyError: for a name that the cell doesn't have; the message lists those it has.
            IndexError: for a layer or direction that the tape doesn't have.
        """
        values = self.track(layer, direction).values
        if name not in values:
            raise KeyError(f"{self.kinds[layer]} in layer {layer} has no {name!r}; it has {', '.join(values)}.")
        return values[name]

    def gradient(self, name: str, layer: int = 0, direction: int = 0) -> Tensor:
        """Return the gradient of the loss at one intermediate, (T, N, size), over all paths to the loss.

        Raises:
            KeyError, IndexError: as :meth:`value`.
            RuntimeError: before a backward from ``outputs``, or for a tape recorded without ``gradients=True``.
        """
        self.value(name, layer, direction)
        probe = self.track(layer, direction).probes.get(name)
        if probe is None:
            raise RuntimeError("The tape was recorded without gradients: record(layer, ..., gradients=True).")
        if probe.grad is None:
            raise RuntimeError("There is no gradient yet: call backward on a loss computed from tape.outputs first.")
        return probe.grad

    @property
    def has_gradients(self) -> bool:
        """Whether there are gradients: recorded with ``gradients=True``, after a backward."""
        return any(probe.grad is not None for probe in self.track(0, 0).probes.values())

    @property
    def steps(self) -> int:
        """The number of steps, T."""
        return int(next(iter(self.track(0, 0).values.values())).shape[0])

    @property
    def rows(self) -> int:
        """The number of rows, N."""
        return int(next(iter(self.track(0, 0).values.values())).shape[1])

    def numpy(self, name: str, layer: int = 0, direction: int = 0) -> Any:
        """Return :meth:`value` as a NumPy array."""
        return self.value(name, layer, direction).numpy()

    def saturation(self, name: str, layer: int = 0, direction: int = 0, *, margin: float = 0.1) -> tuple[float, float]:
        """Return the shares of a gate's values below ``margin`` and above ``1 - margin``, over all valid steps."""
        value = self.valid(self.value(name, layer, direction))
        return (value < margin).double().mean().item(), (value > 1 - margin).double().mean().item()

    def memory_length(self, name: str, layer: int = 0, direction: int = 0) -> Tensor:
        r"""Return the number of steps that each unit remembers, (size,): :math:`1 / (1 - \bar g)`.

        :math:`\bar g` is the mean of a gate over all valid steps: a state multiplied by it at each step decays to 1/e
        in about this number of steps.

        Arguments:
            name: the gate that multiplies the old state, ``"z"`` of a GRU, ``"f"`` of an LSTM.
        """
        mean = self.valid(self.value(name, layer, direction)).mean(0)
        return 1 / (1 - mean)

    def norms(self, name: str, layer: int = 0, direction: int = 0, *, gradient: bool = False) -> Tensor:
        """Return the Euclidean norm of a value, or of its gradient, at each step and row, (T, N)."""
        read = self.gradient if gradient else self.value
        norms: Tensor = torch.linalg.vector_norm(flat(read(name, layer, direction)), dim=-1)
        return norms

    def frame(self, name: str, layer: int = 0, direction: int = 0) -> Any:
        """Return one intermediate as a tidy pandas frame: a line for each valid step, row and unit.

        The units of a value of shape (T, N, d1, ..., dk) are counted row-major.
        """
        import pandas as pd

        value = flat(self.value(name, layer, direction))
        steps, rows, size = value.shape
        t, n, unit = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, value.shape), indexing="ij"))
        table = pd.DataFrame({"step": t, "row": n, "unit": unit, name: value.flatten()})
        valid = self._mask(steps, rows)[..., None].expand(steps, rows, size).flatten()
        return table[valid.numpy()].reset_index(drop=True)

    def save(self, path: str | Path) -> None:
        """Write everything but ``outputs`` to a safetensors file; :meth:`load` reads it."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        entries: list[dict[str, Any]] = []
        for layer, _, track in self.tracks():
            index = len(entries)
            kinds = {"value": track.values, "before": track.before}
            gradients = {name: probe.grad for name, probe in track.probes.items() if probe.grad is not None}
            for kind, values in {**kinds, "gradient": gradients}.items():
                # A state that is the output is the same memory, which safetensors refuses to write twice.
                tensors |= {f"{index}.{kind}.{name}": value.clone() for name, value in values.items()}
            fields = {name: getattr(track, name) for name in ("kind", "reverse", "states", "equation", "source")}
            entries.append({**fields, "layer": layer, "names": list(track.values), "gradients": list(gradients)})
        if self.lengths is not None:
            tensors["lengths"] = self.lengths
        save_file(tensors, path, {"format": FORMAT, "tracks": json.dumps(entries), "labels": json.dumps(self.labels)})

    @classmethod
    def load(cls, path: str | Path, *, max_bytes: int = FILE_BYTES) -> Tape:
        """Read a tape that :meth:`save` wrote; its ``outputs`` are None.

        Arguments:
            path: the file.
            max_bytes: the largest size the file may have.

        Raises:
            OSError: if the file can't be read.
            TapeFileError: if it is not a tape, damaged, or larger than ``max_bytes``; a ValueError.
        """
        try:
            content = read(Path(path), max_bytes)
        except ValueError as error:
            raise TapeFileError(f"{path} is not a tape that was saved, or is damaged: {error}.") from error
        return cls(content.layers, None, content.lengths, content.labels)

    def plot(self, names: Sequence[str] | None = None, layer: int = 0, direction: int = 0, *, row: int = 0) -> Any:
        """Draw a heatmap of each value over time as a matplotlib figure.

        Example:
            >>> import torch, fusecell as fc
            >>> figure = fc.record(fc.GRU(5, 10), torch.randn(7, 3, 5)).plot(["z"])
            >>> len(figure.axes)
            2

        Arguments:
            names: the values to draw; the cell's notes and states if left out.
            layer, direction: the cell.
            row: the row of the batch.

        Raises:
            KeyError, IndexError: as :meth:`value`.
        """
        from fusecell.tape.plots import plot

        return plot(self, names, layer, direction, row)

    def save_html(self, path: str | Path, *, rows: Sequence[int] = (0,), title: str = "") -> None:
        """Write an interactive page as one HTML file that needs no network.

        It shows the unrolled network (a click on a cell shows its equations with their numbers), every value over time,
        saturation and memory, in English and Chinese.

        Arguments:
            path: the file to write.
            rows: the rows of the batch that the page contains.
            title: the page's heading; the cells' classes if left out.

        Raises:
            IndexError: for a row that the tape doesn't have.
        """
        from fusecell.tape.page import page

        Path(path).write_text(page(self, rows, title), encoding="utf-8")

    # Imported on use, here and above: plots and pages need packages that recording doesn't.
    def _repr_html_(self) -> str:
        from fusecell.tape.plots import table

        return table(self)

    def __repr__(self) -> str:
        lines = [f"Tape of {self.steps} steps, {self.rows} rows, {self.directions} direction(s)"]
        for layer, kind in enumerate(self.kinds):
            sizes = ", ".join(f"{name} {_size(value)}" for name, value in self.track(layer, 0).values.items())
            lines.append(f"  {layer} {kind}: {sizes}")
        return "\n".join(lines)

    def track(self, layer: int, direction: int) -> Track:
        """Return everything recorded of a cell in one direction."""
        if not 0 <= layer < len(self._layers):
            raise IndexError(f"The tape has {len(self._layers)} layer(s), got layer {layer}.")
        tracks = self._layers[layer]
        if not 0 <= direction < len(tracks):
            raise IndexError(f"Layer {layer} of the tape has {len(tracks)} direction(s), got direction {direction}.")
        return tracks[direction]

    def tracks(self) -> list[tuple[int, int, Track]]:
        """List all tracks as (layer, direction, track), bottom first."""
        return [
            (layer, direction, track)
            for layer, directions in enumerate(self._layers)
            for direction, track in enumerate(directions)
        ]

    def _mask(self, steps: int, rows: int) -> Tensor:
        """Return where steps are valid, bool (T, N)."""
        if self.lengths is None:
            return torch.ones(steps, rows, dtype=torch.bool)
        return torch.arange(steps)[:, None] < self.lengths

    def valid(self, value: Tensor) -> Tensor:
        """Return a value's valid steps, those of all rows in one dimension: (count, size)."""
        return value[self._mask(*value.shape[:2])]


def flat(value: Tensor) -> Tensor:
    """Return a value (T, N, ...) as (T, N, size), its units counted row-major."""
    return value if value.dim() == 3 else value.reshape(*value.shape[:2], -1)


def _size(value: Tensor) -> str:
    """Format the shape of a row: ``10`` or ``4 x 16 x 16``."""
    return " x ".join(map(str, value.shape[2:])) or "1"
