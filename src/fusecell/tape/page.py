"""Write a tape as one HTML file: its numbers, scripts that draw them, and the library of its charts."""

from __future__ import annotations

import base64
import json
import math
import re
import zlib
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusecell.cells import CELLS
from fusecell.tape.plots import is_gate
from fusecell.tape.tape import Tape, Track, flat

__all__ = ["page"]

_PUBLISHED = frozenset(entry.cell.__name__ for entry in CELLS)
"""Cells whose equations are known; of others a page shows the code as well."""

_SCRIPTS = ("charts", "units", "page")
"""The page's own scripts; the last one starts it."""
_LEVELS = 65532
"""The largest of the 16-bit numbers that values are stored as, from their least to their largest.

A screen shows fewer levels than that, and the page is a fourth of what float32 as JSON text would be. It prints as many
digits as they hold.
"""
_NAN, _MINUS_INFINITY, _INFINITY = 65533, 65534, 65535
"""What stands for numbers that are not finite."""


def page(tape: Tape, rows: Sequence[int], title: str) -> str:
    """Return the HTML page of :meth:`fusecell.Tape.save_html`.

    Raises:
        IndexError: for a row that the tape doesn't have.
        ValueError: for no rows at all.
    """
    indices = [int(row) for row in rows]
    for row in indices:
        if not 0 <= row < tape.rows:
            raise IndexError(f"The tape has {tape.rows} row(s), got row {row}.")
    if not indices:
        raise ValueError("save_html needs a row at least, got none: its pictures are of one row each.")
    data = {
        "title": title or f"{tape.kinds[0]}{f' and {len(tape.kinds) - 1} above' if len(tape.kinds) > 1 else ''}",
        "steps": tape.steps,
        "layers": len(tape.kinds),
        "directions": tape.directions,
        "rows": indices,
        "lengths": [tape.steps if tape.lengths is None else int(tape.lengths[row]) for row in indices],
        "labels": tape.labels,
        "tracks": [_track(tape, track, layer, direction, indices) for layer, direction, track in tape.tracks()],
        "notFinite": [_first_not_finite(tape, row) for row in indices],
    }
    parts = {
        "STYLE": _asset("page.css"),
        "WORDS": _asset("words.json").replace("<", "\\u003c"),
        # A tape may come from somebody else: none of its texts may close the script element and start another.
        "DATA": json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        "LICENSE": _asset("plot/LICENSE").replace("--", "- -"),
        "DTHREE": _compressed(_asset("plot/d3.min.js")),
        "PLOT": _compressed(_asset("plot/plot.umd.min.js")),
        "SCRIPT": "\n".join(_asset(f"{name}.js") for name in _SCRIPTS),
    }
    # All marks in one pass: a text that replaces one may contain another.
    return re.sub(r"/\*([A-Z]+)\*/", lambda mark: parts[mark[1]], _asset("page.html"))


def _track(tape: Tape, track: Track, layer: int, direction: int, rows: list[int]) -> dict[str, Any]:
    """Return what the page's script needs of one layer and direction."""
    values = {}
    for name, value in track.values.items():
        # An output that is a state, as a GRU's, would be drawn twice.
        if name != "output" or not any(value.equal(track.values[state]) for state in track.states):
            values[name] = _packed(flat(value)[:, rows])
    gradients = {}
    if tape.has_gradients:
        gradients = {name: _packed(flat(_gradient(track, name))[:, rows]) for name in values}
    return {
        "kind": track.kind,
        "layer": layer,
        "reverse": track.reverse,
        "states": track.states,
        "equation": track.equation,
        "source": "" if track.kind in _PUBLISHED else track.source,
        "values": values,
        "begins": {name: _begins(tape, track, name, rows) for name in track.states},
        "gradients": gradients,
    }


def _gradient(track: Track, name: str) -> Tensor:
    """Return the gradient of a value: zeros where the loss does not depend on it, as on one of several outputs."""
    gradient = track.probes[name].grad if name in track.probes else None
    return torch.zeros_like(track.values[name]) if gradient is None else gradient


def _begins(tape: Tape, track: Track, name: str, rows: list[int]) -> list[dict[int, list[float | str]]]:
    """Return, for each row, the states before those steps that didn't continue from the step before.

    These are the first step and the resets; the page draws the jump.
    """
    after, before = flat(track.values[name]), flat(track.before[name])
    shifted = torch.roll(after, -1 if track.reverse else 1, 0)
    starts = []
    for row in rows:
        length = tape.steps if tape.lengths is None else int(tape.lengths[row])
        # Exact comparison: where a step continues, before is a copy of the state after its neighbour, its NaN included.
        jumps = (before != shifted) & ~(before.isnan() & shifted.isnan())
        steps = jumps[:length, row].any(-1).nonzero()[:, 0].tolist()
        starts.append({step: [_json_number(number) for number in before[step, row].tolist()] for step in steps})
    return starts


def _json_number(number: float) -> float | str:
    """Round a number for the page; JSON has no NaN and no infinity, so these go as texts that JavaScript reads."""
    if math.isfinite(number):
        return float(f"{number:.6g}")
    return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(number)]


def _first_not_finite(tape: Tape, row: int) -> dict[str, Any] | None:
    """Return where a row's values first stop being finite: in the lowest layer, which others read, by its steps."""
    length = tape.steps if tape.lengths is None else int(tape.lengths[row])
    places = []
    for index, (layer, _, track) in enumerate(tape.tracks()):
        for order, (name, value) in enumerate(track.values.items()):
            bad = ~flat(value)[:length, row].isfinite()
            steps = bad.any(-1).nonzero()[:, 0]
            if len(steps):
                step = int(steps[-1] if track.reverse else steps[0])
                passed = length - 1 - step if track.reverse else step
                unit = int(bad[step].nonzero()[0, 0])
                place = {"track": index, "name": name, "step": step, "unit": unit}
                places.append(((layer, passed, index, order), place))
    return min(places, key=lambda each: each[0])[1] if places else None


def _packed(value: Tensor) -> dict[str, Any]:
    """Encode values of shape (T, rows, size) as base64 of little-endian 16-bit numbers, with their range."""
    numbers = value.double().numpy()
    finite = np.isfinite(numbers)
    low, high = (float(numbers[finite].min()), float(numbers[finite].max())) if finite.any() else (0.0, 0.0)
    # Divided first: the range of float64's largest numbers is infinite. A constant has no range to divide by.
    scale = high / _LEVELS - low / _LEVELS or 1.0
    levels = np.rint(np.where(finite, numbers / scale - low / scale, 0)).clip(0, _LEVELS).astype("<u2")
    levels[np.isnan(numbers)] = _NAN
    levels[numbers == np.inf] = _INFINITY
    levels[numbers == -np.inf] = _MINUS_INFINITY
    return {
        "size": value.shape[-1],
        "low": low,
        "high": high,
        "scale": scale,
        "gate": is_gate(value),
        "data": base64.b64encode(levels.tobytes()).decode("ascii"),
    }


def _asset(name: str) -> str:
    return resources.files("fusecell.tape").joinpath("assets", name).read_text(encoding="utf-8")


def _compressed(text: str) -> str:
    """Deflate a text, which the page inflates: base64, in which nothing closes the HTML element around it."""
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode("ascii")
