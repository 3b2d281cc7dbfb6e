"""``Tape``: what was recorded, by layer, direction and name."""

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
    """What :func:`record` recorded: for each leaf cell and direction the values of its intermediates, step by step.

    Attributes:
        outputs: of the layer.
        kinds: the class of each leaf cell, bottom first.
        directions: how many there are of each.
        lengths: (N,), or None where all rows have all steps.
        labels: a word for each step, or None.
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
        """What is known of a cell: what it notes, each of its states after the step, and its output."""
        return tuple(self.track(layer, 0).values)

    def value(self, name: str, layer: int = 0, direction: int = 0) -> Tensor:
        """One intermediate, (T, N, size), in input time for both directions, 0 beyond a row's length.

        Raises:
            KeyError: for a name that the cell has not; it says which it has.
            IndexError: for a layer or direction that there is not.
        """
        values = self.track(layer, direction).values
        if name not in values:
            raise KeyError(f"{self.kinds[layer]} has {', '.join(values)}; no {name!r}.")
        return values[name]

    def gradient(self, name: str, layer: int = 0, direction: int = 0) -> Tensor:
        """The gradient of one intermediate, (T, N, size): all ways from it to the loss together.

        Raises:
            KeyError: as :meth:`value`.
            RuntimeError: before a backward from ``outputs``, or for a tape recorded without ``gradients=True``.
        """
        self.value(name, layer, direction)
        probe = self.track(layer, direction).probes.get(name)
        if probe is None:
            raise RuntimeError("The tape was recorded without gradients: record(layer, ..., gradients=True).")
        if probe.grad is None:
            raise RuntimeError("There is no gradient yet: call backward on a loss made of tape.outputs first.")
        return probe.grad

    @property
    def has_gradients(self) -> bool:
        """Whether :meth:`gradient` has an answer."""
        return any(probe.grad is not None for probe in self.track(0, 0).probes.values())

    @property
    def steps(self) -> int:
        """T."""
        return int(next(iter(self.track(0, 0).values.values())).shape[0])

    @property
    def rows(self) -> int:
        """N."""
        return int(next(iter(self.track(0, 0).values.values())).shape[1])

    def numpy(self, name: str, layer: int = 0, direction: int = 0) -> Any:
        """:meth:`value` as a NumPy array."""
        return self.value(name, layer, direction).numpy()

    def saturation(self, name: str, layer: int = 0, direction: int = 0, *, margin: float = 0.1) -> tuple[float, float]:
        """The share of a gate's values within ``margin`` of 0 and of 1, over all valid steps."""
        value = self.valid(self.value(name, layer, direction))
        return (value < margin).double().mean().item(), (value > 1 - margin).double().mean().item()

    def memory_length(self, name: str, layer: int = 0, direction: int = 0) -> Tensor:
        r"""For how many steps each unit remembers, (size,): :math:`1 / (1 - \bar g)`, of the mean of a gate.

        Arguments:
            name: the gate that keeps, ``"z"`` of a GRU, ``"f"`` of an LSTM.
        """
        kept = self.valid(self.value(name, layer, direction)).mean(0)
        return 1 / (1 - kept)

    def norms(self, name: str, layer: int = 0, direction: int = 0, *, gradient: bool = False) -> Tensor:
        """The Euclidean norm of a value, or of its gradient, at each step and row, (T, N)."""
        of = self.gradient if gradient else self.value
        found: Tensor = torch.linalg.vector_norm(of(name, layer, direction), dim=-1)
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

        tensors: dict[str, Tensor] = {}
        about: list[dict[str, Any]] = []
        for layer, _, track in self.tracks():
            place = len(about)
            known = {"value": track.values, "before": track.before}
            gradients = {name: probe.grad for name, probe in track.probes.items() if probe.grad is not None}
            for kind, values in {**known, "gradient": gradients}.items():
                # A state that is the output is the same memory, and safetensors keeps none twice.
                tensors |= {f"{place}.{kind}.{name}": value.clone() for name, value in values.items()}
            facts = {name: getattr(track, name) for name in ("kind", "reverse", "states", "equation", "source")}
            about.append({**facts, "layer": layer, "names": list(track.values), "gradients": list(gradients)})
        if self.lengths is not None:
            tensors["lengths"] = self.lengths
        save_file(tensors, path, {"format": FORMAT, "tracks": json.dumps(about), "labels": json.dumps(self.labels)})

    @classmethod
    def load(cls, path: str | Path, *, max_bytes: int = FILE_BYTES) -> Tape:
        """A tape that was saved; it has no ``outputs``.

        Arguments:
            max_bytes: how long the file may be.

        Raises:
            OSError: if the file can't be read.
            TapeFileError: if it is no tape, damaged, or longer; a ValueError.
        """
        try:
            content = read(Path(path), max_bytes)
        except ValueError as error:
            raise TapeFileError(f"{path} is not a tape that was saved, or is damaged: {error}.") from error
        return cls(content.layers, None, content.lengths, content.labels)

    def plot(self, names: Sequence[str] | None = None, layer: int = 0, direction: int = 0, *, row: int = 0) -> Any:
        """A matplotlib figure: a heatmap of each value over time, the labels under it.

        Example:
            >>> import torch, fusecell as fc
            >>> figure = fc.record(fc.GRU(5, 10), torch.randn(7, 3, 5)).plot(["z"])
            >>> len(figure.axes)
            2

        Arguments:
            names: what to show; all that the cell notes, and its states, if left out.
            layer, direction, row: of what.
        """
        from fusecell.tape.plots import plot

        return plot(self, names, layer, direction, row)

    def save_html(self, path: str | Path, *, rows: Sequence[int] = (0,), title: str = "") -> None:
        """Write a page that shows all of it: one file that needs no network.

        Steps by layers by directions, a click on a cell for its equations with the numbers in them, every gate over
        time, saturation and memory, in English and Chinese.

        Arguments:
            path: where to.
            rows: which rows of the batch the page holds.
            title: its heading.

        Raises:
            IndexError: for a row that there is not.
        """
        from fusecell.tape.page import page

        Path(path).write_text(page(self, rows, title), encoding="utf-8")

    def _repr_html_(self) -> str:
        from fusecell.tape.plots import table

        return table(self)

    def __repr__(self) -> str:
        lines = [f"Tape of {self.steps} steps, {self.rows} rows, {self.directions} direction(s)"]
        for layer, kind in enumerate(self.kinds):
            sizes = ", ".join(f"{name} {value.shape[-1]}" for name, value in self.track(layer, 0).values.items())
            lines.append(f"  {layer} {kind}: {sizes}")
        return "\n".join(lines)

    def track(self, layer: int, direction: int) -> Track:
        """All that was recorded of a cell in one direction."""
        if not 0 <= layer < len(self._layers):
            raise IndexError(f"The tape has {len(self._layers)} layer(s), got layer {layer}.")
        tracks = self._layers[layer]
        if not 0 <= direction < len(tracks):
            raise IndexError(f"Layer {layer} of the tape has {len(tracks)} direction(s), got direction {direction}.")
        return tracks[direction]

    def tracks(self) -> list[tuple[int, int, Track]]:
        """All of them as (layer, direction, track), bottom first."""
        return [(layer, way, track) for layer, tracks in enumerate(self._layers) for way, track in enumerate(tracks)]

    def _mask(self, steps: int, rows: int) -> Tensor:
        if self.lengths is None:
            return torch.ones(steps, rows, dtype=torch.bool)
        return torch.arange(steps)[:, None] < self.lengths

    def valid(self, value: Tensor) -> Tensor:
        """The valid steps of a value: (valid steps of all rows, size)."""
        return value[self._mask(*value.shape[:2])]
