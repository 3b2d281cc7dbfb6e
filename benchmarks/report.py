"""Format results as a table, as Markdown and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.measure import Row
from benchmarks.peers import OURS
from benchmarks.shapes import Mode

__all__ = ["as_json", "as_markdown", "as_table", "by_mode", "geometric_mean", "write_json"]


def by_mode(rows: Sequence[Row]) -> dict[Mode, list[Row]]:
    """Group rows by their modes, in the modes' order."""
    groups = {mode: [row for row in rows if row.mode is mode] for mode in Mode}
    return {mode: of_mode for mode, of_mode in groups.items() if of_mode}


def geometric_mean(rows: Sequence[Row]) -> float | None:
    """Return the geometric mean of the ratios to the best peer; None if there are none."""
    ratios = [ratio for row in rows if (ratio := row.ratio()) is not None]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys([OURS.name, *(name for row in rows for name in row.timings)]))


def _cells(row: Row, columns: Sequence[str]) -> list[str]:
    times = [row.microseconds(name) for name in columns]
    ratio = row.ratio()
    return [
        row.shape.name,
        *("" if time is None else f"{time:.3g}" if time < 1000 else f"{time:.0f}" for time in times),
        "" if ratio is None else f"{ratio:.2f}x",
    ]


def _marked(names: Sequence[str], unheld: Collection[str]) -> list[str]:
    return [f"{name}*" if name in unheld else name for name in names]


def as_table(rows: Sequence[Row], title: str, unheld: Collection[str] = ()) -> Table:
    """Make a table of the rows of one mode: microseconds per step, and the best peer's time over ours.

    Arguments:
        unheld: contestants to mark, as they were not held to the level of CPUs that the others were.
    """
    columns = _columns(rows)
    table = Table(title=title, caption="us per time step; last column: the best peer's time over fusecell's")
    table.add_column("cell T/N/I/H", no_wrap=True)
    for name in (*_marked(columns, unheld), "to best peer"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*_cells(row, columns), style="red" if (row.ratio() or 1) < 1 else None)
    return table


def as_markdown(rows: Sequence[Row], unheld: Collection[str] = ()) -> str:
    """Format the same table in Markdown, for a page of the documentation."""
    columns = _columns(rows)
    lines = [["cell T/N/I/H", *_marked(columns, unheld), "to best peer"], ["---", *["---:"] * (len(columns) + 1)]]
    lines += [_cells(row, columns) for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_json(rows: Sequence[Row], about: dict[str, Any]) -> dict[str, Any]:
    """Return all figures, with ``about`` (machine, versions, date, command), as a JSON object."""
    shapes = [
        {
            "mode": row.mode.value,
            **dataclasses.asdict(row.shape),
            "us_per_step": {name: row.microseconds(name) for name in row.timings},
            "seconds_per_call": {name: dataclasses.asdict(timing) for name, timing in row.timings.items()},
            "max_error": row.errors,
            "best_peer": row.best_peer(),
            "ratio_to_best_peer": row.ratio(),
            "not_compiled": row.refused,
            "core_share": row.core_share,
        }
        for row in rows
    ]
    means = {mode.value: geometric_mean(of_mode) for mode, of_mode in by_mode(rows).items()}
    return {**about, "geometric_mean_ratio": means, "shapes": shapes}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
