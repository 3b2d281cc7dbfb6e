"""``Tape``: what was recorded, by layer, direction and name."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Tape", "Track"]


@dataclass(frozen=True)
class Track:
    """What one cell did in one direction.

    Attributes:
        kind: the cell's class.
        reverse: whether it ran from the end to the start.
        states: the names of its states.
        values: (T, N, size) tensors by name.
        find_before: finds ``before``, which few ask for.
        probes: what a backward leaves the gradient of each value in, by name.
        equation: its step, as the zoo writes it; "" for other cells.
        source: its step, as Python.
    """

    kind: str
    reverse: bool
    states: tuple[str, ...]
    values: Mapping[str, Tensor]
    find_before: Callable[[], Mapping[str, Tensor]]
    probes: Mapping[str, Tensor]
    equation: str = ""
    source: str = ""

    @functools.cached_property
    def before(self) -> Mapping[str, Tensor]:
        """The states each step began with, (T, N, size) by name."""
        return self.find_before()


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
        save_file(tensors, path, {"format": _FORMAT, "tracks": json.dumps(about), "labels": json.dumps(self.labels)})

    @classmethod
    def load(cls, path: str | Path) -> Tape:
        """A tape that was saved; it has no ``outputs``.

        Raises:
            OSError: if the file can't be read.
            ValueError: if it is no tape, or damaged.
        """
        from safetensors import SafetensorError, safe_open

        with Path(path).open("rb"):  # an OSError of its own words
            pass
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
            if about.get("format") != _FORMAT:
                raise ValueError(f"its format is {about.get('format')!r}, expected {_FORMAT!r}")
            layers: dict[int, list[Track]] = {}
            for place, entry in enumerate(json.loads(about["tracks"])):
                layers.setdefault(entry["layer"], []).append(_loaded(place, entry, tensors))
            tape = cls(list(layers.values()), None, tensors.get("lengths"), json.loads(about["labels"]))
            _check(tape)
            return tape
        except (SafetensorError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a tape that was saved, or is damaged: {error}") from error

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


_FORMAT = "fusecell tape 1"


def _loaded(place: int, entry: Any, tensors: Mapping[str, Tensor]) -> Track:
    kinds = {"kind": str, "reverse": bool, "equation": str, "source": str, "layer": int}
    wrong = [name for name, kind in kinds.items() if not isinstance(entry[name], kind)]
    if wrong:
        raise ValueError(f"the {', '.join(wrong)} of its track {place} cannot be read")

    def found(kind: str, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: tensors[f"{place}.{kind}.{name}"] for name in names}

    values, before = found("value", entry["names"]), found("before", entry["states"])
    gradients, probes = found("gradient", entry["gradients"]), {}
    for name, gradient in gradients.items():
        if gradient.shape != values[name].shape or gradient.dtype != values[name].dtype:
            raise ValueError(f"the gradient of {name!r} of its track {place} is not like the value")
        probe = probes[name] = torch.zeros_like(values[name])
        probe.grad = gradient
    states = tuple(entry["states"])
    return Track(
        entry["kind"], entry["reverse"], states, values, lambda: before, probes, entry["equation"], entry["source"]
    )


def _check(tape: Tape) -> None:
    """Whether what was read fits together."""
    shape = tape.steps, tape.rows
    for _, _, track in tape.tracks():
        for name, value in (*track.values.items(), *track.before.items()):
            if value.dim() != 3 or value.shape[:2] != shape or not value.is_floating_point():
                raise ValueError(f"{name!r} of {track.kind} is {value.dtype} of shape {tuple(value.shape)}")
        if any(track.before[name].shape != track.values[name].shape for name in track.states):
            raise ValueError(f"the states of {track.kind} do not fit")
    lengths, labels = tape.lengths, tape.labels
    if lengths is not None and (lengths.shape != shape[1:] or lengths.dtype != torch.int64):
        raise ValueError(f"its lengths are {lengths.dtype} of shape {tuple(lengths.shape)}")
    if lengths is not None and lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= shape[0]:
        raise ValueError("its lengths are not those of its steps")
    if labels is not None and (
        len(labels) != shape[0] or not all(isinstance(label, str | int | float) for label in labels)
    ):
        raise ValueError("its labels are not one for each step")
