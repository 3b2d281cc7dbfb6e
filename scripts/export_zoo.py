"""Export every cell of the zoo for every target that can be run here, and hold each to the bits of its stream.

    python scripts/export_zoo.py                 all cells and targets, and C99 by gcc and clang
    python scripts/export_zoo.py --cells gru lstm --targets aarch64 c --float64

Targets run on this machine or emulated: qemu-user for aarch64, riscv64 and armv7, qemu-system-arm for Cortex-M, Node.js
for wasm32. One whose tools are missing is listed with the reason. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

import fusecell as fc

TARGETS = (
    "host", "x86-64-v2", "x86-64-v3", "aarch64", "riscv64", "armv7", "wasm32",
    "cortex-m4", "cortex-m7", "cortex-m33", "cortex-m55",
)  # fmt: skip
INPUT_SIZE, HIDDEN_SIZE = 5, 13
STRUCTURED_INPUT_SIZE, STRUCTURED_HIDDEN_SIZE = 12, 24  # multiples of their heads, blocks and channels


@dataclass(frozen=True)
class Exported:
    """A model, and the sizes of its inputs where it takes several."""

    model: torch.nn.Module
    input_sizes: tuple[tuple[int, ...], ...] | None = None


def models() -> dict[str, Exported]:
    """Return every cell of the zoo, and a model of several, by name; sizes are multiples of nothing that needn't be."""
    made: dict[str, Exported] = {}
    for member in fc.CELLS:
        torch.manual_seed(3)
        made[member.name] = Exported(fc.Recurrent(member.make(INPUT_SIZE, HIDDEN_SIZE)))
    for entry in fc.cells.STRUCTURED_CELLS:
        torch.manual_seed(3)
        cell = entry.make(STRUCTURED_INPUT_SIZE, STRUCTURED_HIDDEN_SIZE)
        made[entry.name] = Exported(fc.Recurrent(cell), entry.input_sizes(cell, STRUCTURED_INPUT_SIZE))
    stack = fc.Recurrent(fc.Stack(fc.GRUCell(INPUT_SIZE, 7), fc.LSTMCell(7, 7), residual=True))
    made["stack_with_readout"] = Exported(fc.Sequential(stack, torch.nn.Linear(7, 3), torch.nn.Tanh()))
    return made


def check(exported: Exported, target: str, folder: Path, *, batch_size: int, double: bool = False) -> str:
    """Export a model and run it; return "same bits" and where, a reason why not, or what differs."""
    fmt = "c" if target == "c" else "object"
    machine = "host" if target == "c" else target
    try:
        model = exported.model.double() if double else exported.model
        stream = fc.Stream(model.eval(), batch_size, input_sizes=exported.input_sizes)
        report = fc.export(stream, folder / "model", machine, fmt, verify=True)
    except (fc.FusecellError, ValueError, TypeError) as error:
        return f"FAILED: {error}"
    return report.verified


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", nargs="*", help="names of cells; all if left out")
    parser.add_argument("--targets", nargs="*", default=[*TARGETS, "c"], help="targets, and c for C99")
    parser.add_argument("--float64", action="store_true", help="in float64, not float32")
    parser.add_argument("--batch-size", type=int, default=1)
    args = parser.parse_args()
    failed = False
    chosen = {name: each for name, each in models().items() if not args.cells or name in args.cells}
    for target in args.targets:
        if args.float64 and target in ("cortex-m4", "cortex-m33"):
            continue  # float32 only
        began, results = time.perf_counter(), Counter[str]()
        for name, each in chosen.items():
            with tempfile.TemporaryDirectory() as folder:
                result = check(each, target, Path(folder), batch_size=args.batch_size, double=args.float64)
            results[result] += 1
            if result.startswith("FAILED"):
                failed = True
                print(f"{target} {name}: {result}", flush=True)
        for result, count in results.items():
            if not result.startswith("FAILED"):
                print(
                    f"{target:12} {count:2} of {len(chosen)}: {result} ({time.perf_counter() - began:.0f} s)",
                    flush=True,
                )
    missing = [tool for tool in ("qemu-aarch64", "qemu-system-arm", "node") if shutil.which(tool) is None]
    if missing:
        print(f"not installed: {', '.join(missing)}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
