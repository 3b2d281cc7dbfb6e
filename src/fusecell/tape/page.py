"""A tape as one HTML file: numbers packed into it, drawn by the page's own script and by Plotly's."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusecell.tape.plots import is_gate
from fusecell.tape.tape import Tape, Track

__all__ = ["page"]

_LEVELS = 65535
"""Values are stored in 16 bits between their least and their largest."""


def page(tape: Tape, rows: Sequence[int], title: str) -> str:
    """The HTML of :meth:`fusecell.Tape.save_html`."""
    chosen = [int(row) for row in rows]
    for row in chosen:
        if not 0 <= row < tape.rows:
            raise IndexError(f"The tape has {tape.rows} row(s), got row {row}.")
    if not chosen:
        raise ValueError("save_html needs a row at least.")
    data = {
        "title": title or f"{tape.kinds[0]}{f' and {len(tape.kinds) - 1} above' if len(tape.kinds) > 1 else ''}",
        "steps": tape.steps,
        "layers": len(tape.kinds),
        "directions": tape.directions,
        "rows": chosen,
        "lengths": [tape.steps if tape.lengths is None else int(tape.lengths[row]) for row in chosen],
        "labels": tape.labels,
        "tracks": [_track(tape, track, layer, direction, chosen) for layer, direction, track in tape.tracks()],
    }
    parts = {
        "STYLE": _asset("page.css"),
        "WORDS": _asset("words.json").replace("<", "\\u003c"),
        # A tape may come from elsewhere: no text of its own may end the element that it stands in.
        "DATA": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
        "PLOTLY": _inside(_plotly()),
        "SCRIPT": _asset("page.js"),
    }
    # In one go, for what is put in may hold such a mark too.
    return re.sub(r"/\*([A-Z]+)\*/", lambda mark: parts[mark[1]], _asset("page.html"))


def _track(tape: Tape, track: Track, layer: int, direction: int, rows: list[int]) -> dict[str, Any]:
    values = {}
    for name, value in track.values.items():
        if name != "output" or not any(value.equal(track.values[state]) for state in track.states):
            values[name] = _packed(value[:, rows])
    gradients = {}
    if tape.has_gradients:
        gradients = {name: _packed(tape.gradient(name, layer, direction)[:, rows]) for name in values}
    return {
        "kind": track.kind,
        "layer": layer,
        "reverse": track.reverse,
        "states": track.states,
        "equation": track.equation,
        "source": track.source,
        "values": values,
        "begins": {name: _begins(tape, track, name, rows) for name in track.states},
        "gradients": gradients,
    }


def _begins(tape: Tape, track: Track, name: str, rows: list[int]) -> list[dict[int, list[float]]]:
    """For each row, the states of those steps that did not go on from the step before: the first, and resets."""
    after, before = track.values[name], track.before[name]
    shifted = torch.roll(after, -1 if track.reverse else 1, 0)
    found = []
    for row in rows:
        length = tape.steps if tape.lengths is None else int(tape.lengths[row])
        new = (before[:length, row] != shifted[:length, row]).any(-1).nonzero()[:, 0].tolist()
        found.append({step: [float(f"{number:.6g}") for number in before[step, row].tolist()] for step in new})
    return found


def _packed(value: Tensor) -> dict[str, Any]:
    """(T, rows, size) as base64 of 16-bit numbers."""
    numbers = np.nan_to_num(value.double().numpy())
    low, high = float(numbers.min()), float(numbers.max())
    scale = (high - low) / _LEVELS or 1.0
    levels = np.rint((numbers - low) / scale).astype("<u2")
    return {
        "size": value.shape[-1],
        "low": low,
        "scale": scale,
        "gate": is_gate(value),
        "data": base64.b64encode(levels.tobytes()).decode("ascii"),
    }


def _asset(name: str) -> str:
    return resources.files("fusecell.tape").joinpath("assets", name).read_text(encoding="utf-8")


def _plotly() -> str:
    """Plotly's script, out of its package."""
    try:
        return resources.files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError('A tape\'s page needs plotly:  pip install "fusecell[tape]"') from missing


def _inside(text: str) -> str:
    """Text that can stand in a script element: nothing in it ends the element."""
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")
