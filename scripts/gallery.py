"""Write the gallery, a page for each published cell: ``python scripts/gallery.py docs/gallery``.

A page has the cell's equation and paper, a drawing of its step made from its graph, its gates over sixty years of
sunspots that it has learned to predict, what it costs, and its code.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import statistics
import textwrap
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

matplotlib.use("Agg")  # before pyplot is imported: there may be no display
from matplotlib import pyplot as plt
from statsmodels.datasets import sunspots

import fusecell as fc
from fusecell.cells import CELLS, STRUCTURED_CELLS
from fusecell.inspection.environment import show_config

FEATURES, SIZE, SHOWN, MOST_VALUES = 32, 64, 60, 5
WINDOW, ROWS = 60, 16
_GREY = "#8a94a0"


@dataclass(frozen=True)
class Entry:
    """A cell of the gallery.

    Attributes:
        cell: built for `FEATURES` features and `SIZE` units.
        inputs: random inputs of a sequence, where it takes more than one, or no vector; else None.
    """

    name: str
    kind: type[fc.Cell]
    paper: str
    summary: str
    equation: str
    cell: fc.Cell
    inputs: Any


def entries() -> Iterator[Entry]:
    """Iterate over all published cells."""
    for each in CELLS:
        cell = each.make(FEATURES, SIZE)
        yield Entry(each.name, each.cell, each.paper, each.summary, each.equation, cell, None)
    for other in STRUCTURED_CELLS:
        cell, inputs = other.make(FEATURES, SIZE), other.inputs(SHOWN, 1, FEATURES)
        is_vector = isinstance(inputs, Tensor) and inputs.dim() == 3
        yield Entry(
            other.name, other.cell, other.paper, other.summary, other.equation, cell, None if is_vector else inputs
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Write all pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--updates", type=int, default=150, help="of the training before a cell is shown")
    parser.add_argument("--steps", type=int, default=2000, help="that are timed of each cell")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for entry in entries():
        torch.manual_seed(0)
        (options.folder / f"{entry.name}.md").write_text(_page(entry, options), encoding="utf-8")
        rows.append(f"| [{entry.name}]({entry.name}.md) | {entry.summary} | `{entry.equation}` |")
    (options.folder / "index.md").write_text(_INDEX + "\n".join(rows) + "\n", encoding="utf-8")


_INDEX = """# Gallery

Every published cell that comes with fusecell, drawn from its own graph, with its gates at work and its code. Each is
a `step` of a dozen lines that you can copy and change: [how to write a cell](../cells.md). `fc.diagram(cell)` draws one
of your own.

| cell | what it is | its step |
|---|---|---|
"""


def _page(entry: Entry, options: argparse.Namespace) -> str:
    cell, name, kind = entry.cell, entry.name, entry.kind.__name__
    inputs = entry.inputs if entry.inputs is not None else torch.randn(SHOWN, 1, FEATURES)
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    cell.eval()
    fc.diagram(cell, options.folder / f"{name}.svg", input_sizes=[tuple(each.shape[2:]) for each in tensors])
    caption = _record(entry, options.folder / f"{name}.png", options.updates)
    doc = inspect.getdoc(entry.kind) or ""
    return "\n".join(
        [
            f"# {name}",
            "",
            f"**{kind}**: {entry.summary}. {entry.paper}.",
            "",
            *_equation(doc),
            "## Its step",
            "",
            f"![The step of {kind}, from its inputs and states to its new states]({name}.svg){{ .wide }}",
            "",
            "Blue is an input, yellow a state before and after the step, green the output; `σ` is the sigmoid. Drawn",
            "from the graph that the compiler makes of the code below.",
            "",
            "## At work",
            "",
            f"![The values of {kind} at every step]({name}.png)",
            "",
            caption,
            "",
            "## What it costs",
            "",
            *_costs(entry, inputs, options.steps),
            "",
            "## Its code",
            "",
            "```python",
            textwrap.dedent(inspect.getsource(entry.kind.step)).rstrip(),
            "```",
            "",
            f"Arguments, shapes and an example: [{kind}](../api/cells.md#{kind.lower()}).",
            "",
        ]
    )


def _equation(doc: str) -> list[str]:
    """Return the equation of a docstring, if it has one."""
    reference = _api_reference()
    paragraphs = reference._paragraphs(doc.partition("\nExample:")[0].splitlines(), {})
    text = "\n".join(paragraphs)
    return ["$$", text.split("$$")[1].strip(), "$$", ""] if text.count("$$") >= 2 else []


def _api_reference() -> Any:
    path = Path(__file__).parent / "api_reference.py"
    spec = importlib.util.spec_from_file_location("api_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# At work


class _Predictor(nn.Module):
    """A cell between a map of one number to its features and one of its output to the next number."""

    def __init__(self, cell: fc.Cell) -> None:
        super().__init__()
        self.to_cell = nn.Linear(1, FEATURES)
        self.layer = fc.Recurrent(cell)
        size = fc.shapes.output_shape(cell.output_size)
        self.readout = nn.Linear(int(np.prod(size)), 1)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.layer(self.to_cell(x))
        result: Tensor = self.readout(y.flatten(2))
        return result


def _record(entry: Entry, path: Path, updates: int) -> str:
    """Plot a cell's values over a sequence; return the caption."""
    if entry.inputs is not None:
        with torch.no_grad():
            tape = fc.record(fc.Recurrent(entry.cell), entry.inputs)
        labels, caption = np.arange(SHOWN), f"{SHOWN} steps of random inputs, before any training."
    else:
        years, spots = _sunspots()
        model = _Predictor(entry.cell)
        error = _train(model, spots[: len(spots) - SHOWN], updates)
        with torch.no_grad():
            tape = fc.record(model.layer, model.to_cell(spots[-SHOWN:, None, None]))
        labels = years[-SHOWN:]
        caption = (
            f"Sunspots of {labels[0]:.0f} to {labels[-1]:.0f}, which it hasn't seen in training: above, their number; "
            "below, what its units do in each year, red up to the largest, blue down to the least."
        )
        if updates:
            caption += (
                f" Trained for {updates} updates to predict the next year's, to an error of {error:.2f} standard "
                "deviations."
            )
    _plot(tape, labels, None if entry.inputs is not None else spots[-SHOWN:].numpy(), path)
    return caption


def _sunspots() -> tuple[Any, Tensor]:
    """Return years and their numbers of sunspots, standardised (SIDC, in statsmodels)."""
    data = sunspots.load_pandas().data
    values = data["SUNACTIVITY"].to_numpy()
    return data["YEAR"].to_numpy(), torch.tensor((values - values.mean()) / values.std(), dtype=torch.float32)


def _train(model: _Predictor, series: Tensor, updates: int) -> float:
    """Train on windows of a series; return the root mean square error of the last updates."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    generator, errors = torch.Generator().manual_seed(0), []
    for _ in range(updates):
        starts = torch.randint(len(series) - WINDOW, (ROWS,), generator=generator)
        windows = torch.stack([series[start : start + WINDOW] for start in starts], 1)[..., None]
        loss = (model(windows[:-1]) - windows[1:]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        errors.append(float(loss.detach().sqrt()))
    model.eval()
    return statistics.fmean(errors[-20:] or [float("nan")])


def _plot(tape: fc.Tape, labels: Any, series: Any, path: Path) -> None:
    """Draw a row of units over time for each named value, and the series above."""
    values = {name: tape.value(name)[:, 0].flatten(1).numpy()[:, :SIZE] for name in tape.names()}
    values = {name: value for name, value in values.items() if name != "output" or len(values) == 1}
    names = list(values)[:MOST_VALUES]
    ratios = ([1.2] if series is not None else []) + [1.6] * len(names)
    figure, rows = plt.subplots(
        len(ratios), figsize=(8, 0.55 + 0.85 * sum(ratios)), height_ratios=ratios, sharex=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    axes = list(rows[:, 0])
    figure.patch.set_alpha(0)
    if series is not None:
        axes[0].plot(labels, series, color=_GREY)
        axes[0].set_ylabel("sunspots", color=_GREY)
    for name, ax in zip(names, axes[len(axes) - len(names) :], strict=True):
        most = max(float(np.abs(values[name]).max()), 1e-9)
        extent = (labels[0] - 0.5, labels[-1] + 0.5, values[name].shape[1] - 0.5, -0.5)
        ax.imshow(
            values[name].T, aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most, extent=extent, interpolation="nearest"
        )
        ax.set_ylabel(name, color=_GREY)
    for ax in axes:
        ax.patch.set_alpha(0)
        ax.tick_params(colors=_GREY, labelsize=8)
        for spine in ax.spines.values():
            spine.set_color(_GREY)
    figure.savefig(path, dpi=90)
    plt.close(figure)


# What it costs


def _costs(entry: Entry, inputs: Any, steps: int) -> list[str]:
    cell = entry.cell.eval()
    parameters = sum(value.numel() for value in cell.parameters())
    (layer,) = fc.summary(cell, seq_len=1).layers
    lines = [
        f"With {_features(inputs)} and {_units(cell)}:",
        "",
        "| | |",
        "|---|---:|",
        f"| parameters | {parameters:,} |",
    ]
    if layer.macs is not None:
        lines.append(f"| multiply-adds a step | {layer.macs:,} |")
    if steps:
        cpu = show_config().target.partition(",")[0].removeprefix("host ")
        lines += [
            f"| a step of one row, in inference | {1e6 * _seconds(cell, inputs, steps):.2f} us |",
            "",
            f"The time is the median of ten calls of {max(1, steps // 10)} steps when this page was built, on one core "
            f"of a CPU that LLVM calls {cpu}.",
        ]
    return lines


def _features(inputs: Any) -> str:
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    return "inputs of " + ", ".join(" x ".join(map(str, each.shape[2:])) for each in tensors) + " features"


def _units(cell: fc.Cell) -> str:
    sizes = [fc.shapes.feature_shape(size) for size in cell.state_sizes]
    pairs = zip(cell.states, sizes, strict=True)
    return "states " + ", ".join(f"{name} of {' x '.join(map(str, size))}" for name, size in pairs)


def _seconds(cell: fc.Cell, inputs: Any, steps: int) -> float:
    """Time a step of a sequence of one row."""
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    length = max(1, steps // 10)
    longer = tuple([each[torch.arange(length) % len(each)] for each in tensors])
    layer, times = fc.Recurrent(cell), []
    with torch.no_grad():
        for turn in range(11):
            began = time.perf_counter()
            layer(longer if len(longer) > 1 else longer[0])
            if turn:
                times.append((time.perf_counter() - began) / length)
    return statistics.median(times)


if __name__ == "__main__":
    main()
