"""Time fusecell against torch.nn, ONNX Runtime, OpenVINO and JAX: ``python -m benchmarks.run``.

No framework is imported before the process is bound to its cores: most of them count cores when imported.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.levels import LEVELS, hold
from benchmarks.machine import bind, describe, revision, versions
from benchmarks.shapes import Mode, Shape, pick

__all__ = ["main"]

_PACKAGES = ("fusecell", "torch", "numpy", "llvmlite", "onnxruntime", "openvino", "jax")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="cores that every contestant gets")
    parser.add_argument(
        "--mode",
        action="append",
        type=Mode,
        metavar="MODE",
        help=f"one of {', '.join(mode.value for mode in Mode)}; may be given again; all of them if left out",
    )
    parser.add_argument("--quick", action="store_true", help="one small shape of each cell in each mode")
    parser.add_argument("--only", metavar="SUBSTRING", help="shapes with this in their name, such as 'lstm' or '/1/'")
    parser.add_argument("--peers", metavar="NAMES", help="separated by commas; all that are installed if left out")
    parser.add_argument(
        "--level", choices=LEVELS, help="hold all to a level of CPUs: x86-64-v3 is AVX2; a * marks those that can't be"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="timing of a shape, all contestants together")
    parser.add_argument("--json", type=Path, default=Path("bench-output/bench.json"), help="where the figures go")
    parser.add_argument("--markdown", action="store_true", help="print the tables once more for a page")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmarks that the command line asks for, print and write the results."""
    options = parse(arguments)
    modes = [mode for mode in Mode if options.mode is None or mode in options.mode]
    jobs = [(shape, mode) for mode in modes for shape in pick(mode, options.only, quick=options.quick)]
    if not jobs:
        names = ", ".join(dict.fromkeys(shape.name for mode in modes for shape in pick(mode, quick=options.quick)))
        raise SystemExit(f"--only {options.only!r} is in no shape's name; there are {names}.")
    unheld = hold(options.level) if options.level else ()
    try:
        cores = bind(options.threads)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    command = sys.argv[1:] if arguments is None else arguments
    about = {
        "command": shlex.join(["python", "-m", "benchmarks.run", *command]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {**describe(), "bound_to": cores},
        "revision": revision(),
        "versions": versions(_PACKAGES),
        "threads": options.threads,
        "level": options.level,
        "not_held_to_level": list(unheld),
    }
    _run(jobs, options, about)


def _run(jobs: Sequence[tuple[Shape, Mode]], options: argparse.Namespace, about: dict[str, object]) -> None:
    import torch
    from rich.console import Console

    from benchmarks import report
    from benchmarks.measure import measure
    from benchmarks.peers import PEERS, installed

    torch.set_num_threads(options.threads)
    console = Console(width=max(Console().width, 110))  # wide enough where there is no terminal
    names = {peer.name for peer in PEERS} if options.peers is None else set(options.peers.split(","))
    if unknown := names - {peer.name for peer in PEERS}:
        raise SystemExit(
            f"--peers: no peer is called {', '.join(unknown)}; there are {', '.join(p.name for p in PEERS)}."
        )
    requested = [peer for peer in PEERS if peer.name in names]
    peers = [peer for peer in requested if installed(peer)]
    missing = [peer.name for peer in requested if peer not in peers]
    rows = []
    for shape, mode in jobs:
        console.print(f"[dim]{mode.value} {shape.name}")
        rows.append(measure(shape, mode, peers, options.threads, options.seconds))
        if rows[-1].refused:
            console.print(rows[-1].refused)
    unheld = tuple(str(name) for name in about["not_held_to_level"])
    level = f", held to {options.level}" if options.level else ""
    for mode, of_mode in report.by_mode(rows).items():
        console.print(report.as_table(of_mode, f"{mode.title}, {options.threads} thread(s){level}", unheld))
        mean = report.geometric_mean(of_mode)
        if mean is not None:
            console.print(f"Geometric mean over the best peer: {mean:.2f}x.")
        if options.markdown:
            print(f"## {mode.title}\n\n{report.as_markdown(of_mode, unheld)}\n")
    if unheld:
        console.print(f"* not held to {options.level}: {', '.join(unheld)}.")
    if missing:
        console.print(f"Not installed, so left out: {', '.join(missing)}.")
    report.write_json(options.json, report.as_json(rows, {**about, "not_installed": missing}))
    console.print(f"Written to {options.json}.")


if __name__ == "__main__":
    main()
