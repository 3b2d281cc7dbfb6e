"""Write trained cells as one HTML file: their steps as WebAssembly, and a script that runs and draws them."""

from __future__ import annotations

import base64
import json
import re
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from fusecell.exporting import export
from fusecell.layers import Recurrent
from fusecell.play.models import ALPHABET, KINDS, TASKS, Model, train_models, zoo_cell
from fusecell.tape.plots import is_gate

__all__ = ["page", "write_page"]

_SCRIPTS = ("words.js", "model.js", "memory.js", "drawing.js", "weights.js", "pane.js", "sequences.js", "app.js")
"""In the order in which they build on one another; together they are the page's one script."""


def write_page(path: str | Path, *, seed: int = 0, kinds: Sequence[str] = KINDS, updates: int | None = None) -> Path:
    """Train the models and write the page of ``fusecell play``: one file that needs no network.

    Example:
        >>> import tempfile, pathlib
        >>> from fusecell.play import write_page
        >>> path = write_page(pathlib.Path(tempfile.mkdtemp()) / "play.html", updates=1)
        >>> path.stat().st_size < 1_000_000
        True

    Arguments:
        path: the file to write.
        seed: of the weights and of the training's sequences.
        kinds: the cells, by their names in :data:`fusecell.CELLS`.
        updates: of each model's training, instead of its task's own.

    Returns:
        The path.

    Raises:
        OSError: if the file can't be written.
        ValueError: for a name that is not in :data:`fusecell.CELLS`, or of a cell that :class:`PlayCell` doesn't take.
    """
    path = Path(path)
    path.write_text(page(train_models(seed, kinds=kinds, updates=updates)), encoding="utf-8")
    return path


def page(models: Sequence[Model]) -> str:
    """Return the page of trained models as HTML."""
    data = {
        "alphabet": ALPHABET,
        "tasks": {name: {"features": task.features, "units": task.hidden_size} for name, task in TASKS.items()},
        "models": [_described(model) for model in models],
    }
    parts = {
        "STYLE": _asset("page.css"),
        "WORDS": _in_script(json.loads(_asset("words.json"))),
        "DATA": _in_script(data),
        "SCRIPT": "\n".join(_asset(name) for name in _SCRIPTS),
    }
    # All marks in one pass: a text that replaces one may contain another.
    return re.sub(r"/\*([A-Z]+)\*/", lambda mark: parts[mark[1]], _asset("page.html"))


def _described(model: Model) -> dict[str, Any]:
    """Return what the page's script needs of a model: its module, and where everything lies in its arrays."""
    member, cell = zoo_cell(model.kind), model.cell
    with tempfile.TemporaryDirectory() as folder:
        export(Recurrent(cell), Path(folder) / "cell", format="web")
        wasm, script = Path(folder, "cell.wasm").read_bytes(), Path(folder, "cell.mjs").read_text(encoding="utf-8")
    own = len(cell.cell.states)
    return {
        "task": model.task,
        "kind": model.kind,
        "equation": member.equation,
        "paper": member.paper,
        "loss": round(model.loss, 4),
        "wasm": base64.b64encode(wasm).decode("ascii"),
        "script": script,
        "holds": {name: [place.start, place.stop] for name, place in cell.holds.items()},
        "values": {name: [place.start, place.stop] for name, place in cell.values.items()},
        "states": list(cell.states[:own]),
        "stateSize": sum(cell.state_sizes[:own]),
        "weights": {name.removeprefix("cell_"): shape for name, shape in cell.weights.items()},
        "gates": _gates(model),
        "blocks": list(cell.cell.gates),
    }


def _gates(model: Model) -> list[str]:
    """Return the names of the values between 0 and 1, on sequences of the model's task."""
    cell, x = model.cell, TASKS[model.task].batch(torch.Generator().manual_seed(0), True)
    free = torch.full((*x.shape[:-1], cell.input_size - x.shape[-1]), torch.nan)
    with torch.no_grad():
        outputs, _ = Recurrent(cell)(torch.cat((x, free), -1))
    return [name for name, place in cell.values.items() if is_gate(outputs[..., place])]


def _in_script(data: object) -> str:
    """Return data as JSON that ends no script element."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return resources.files("fusecell.play").joinpath("assets", name).read_text(encoding="utf-8")
