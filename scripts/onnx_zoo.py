"""Export every cell of the zoo to ONNX, and run each model: ``python scripts/onnx_zoo.py``.

In float32 by ONNX Runtime, within 1e-5 of the layer, in float64 by onnx's reference, within 1e-12; for sequences of two
lengths and two batches, from random states, with a row without steps, and one step at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from rich.progress import track

import fusecell as fc
from fusecell.cells import CELLS
from fusecell.cells.structured import STRUCTURED_CELLS


def cells() -> Iterator[tuple[str, fc.Cell, list[torch.Size] | None]]:
    """Iterate over (name, cell, shapes of its inputs where it has several)."""
    for zoo_cell in CELLS:
        yield zoo_cell.name, zoo_cell.make(5, 8), None
    for structured in STRUCTURED_CELLS:
        inputs = structured.inputs(1, 1, 8)
        shapes = [value.shape[2:] for value in inputs] if isinstance(inputs, tuple) else None
        yield structured.name, structured.make(8, 8), shapes


def main() -> None:
    torch.manual_seed(0)
    failures = {}
    for name, cell, shapes in track(list(cells()), "exporting"):
        for options in ({}, {"lengths": True}, {"step": True}):
            for dtype in (torch.float32, torch.float64):
                try:
                    fc.onnx.export(cell.to(dtype), input_shapes=shapes, **options)
                except Exception as error:
                    failures[name, str(options), dtype] = f"{type(error).__name__}: {error}"
    for case, reason in failures.items():
        print(*case, reason)
    print(f"{len(failures)} of {6 * len(list(cells()))} exports failed")


if __name__ == "__main__":
    main()
