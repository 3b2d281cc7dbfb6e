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
from pathlib import Path

import torch

import fusecell as fc

TARGETS = (
    "host", "x86-64-v2", "x86-64-v3", "aarch64", "riscv64", "armv7", "wasm32",
    "cortex-m4", "cortex-m7", "cortex-m33", "cortex-m55",
)  # fmt: skip
INPUT_SIZE, HIDDEN_SIZE = 5, 13


def models() -> dict[str, torch.nn.Module]:
    """Return every cell of the zoo, and a model of several, by name; sizes are multiples of nothing."""
    made: dict[str, torch.nn.Module] = {}
    for member in fc.CELLS:
        torch.manual_seed(3)
        made[member.name] = fc.Recurrent(member.make(INPUT_SIZE, HIDDEN_SIZE))
    stack = fc.Recurrent(fc.Stack(fc.GRUCell(INPUT_SIZE, 7), fc.LSTMCell(7, 7), residual=True))
    made["stack_with_readout"] = fc.Sequential(stack, torch.nn.Linear(7, 3), torch.nn.Tanh())
    return made


def check(model: torch.nn.Module, target: str, folder: Path, *, batch_size: int) -> str:
    """Export a model and run it; return "same bits" and where, a reason why not, or what differs."""
    fmt = "c" if target == "c" else "object"
    machine = "host" if target == "c" else target
    try:
        stream = fc.Stream(model.eval(), batch_size)
        report = fc.export(stream, folder / "model", machine, fmt, verify=True)
    except (fc.ExportError, ValueError) as error:
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
    chosen = {name: model for name, model in models().items() if not args.cells or name in args.cells}
    for target in args.targets:
        if args.float64 and target in ("cortex-m4", "cortex-m33"):
            continue  # float32 only
        began, results = time.perf_counter(), Counter[str]()
        for name, model in chosen.items():
            with tempfile.TemporaryDirectory() as folder:
                result = check(
                    model.double() if args.float64 else model, target, Path(folder), batch_size=args.batch_size
                )
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
