"""``python -m tests.reliability.memcheck``: kernels, forward and backward, under valgrind's memcheck.

Counted is what generated code does, and whether what it made is whole; Python's and LLVM's own errors are not.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import torch

import fusecell as fc
from fusecell.compiler.backend import llvm
from fusecell.compiler.dispatch.runner import find_trainable

__all__ = ["LEVEL", "check", "errors", "write_graphs"]

LEVEL = "x86-64-v3" if {"avx2", "fma"} <= llvm.host().features else "x86-64-v2"
"""Valgrind 3.19 knows no AVX-512."""
CELLS = (fc.GRUCell, fc.LSTMCell, fc.cells.LayerNormGRUCell, fc.cells.MGUCell)


def write_graphs(folder: Path, kinds: Sequence[type[fc.Cell]] = CELLS) -> None:
    """The graphs of the forward and the backward of some cells."""
    for kind, dtype in itertools.product(kinds, (torch.float32, torch.float64)):
        cell = kind(5, 17).to(dtype)
        x = torch.randn(7, 3, 5, dtype=dtype)
        trainable = find_trainable(cell, (x,))
        graphs = trainable.training((True,) * (1 + len(list(cell.parameters()))), recompute=False).halves
        for name in ("forward", "backward"):
            (folder / f"{kind.__name__}.{str(dtype)[6:]}.{name}.graph").write_text(getattr(graphs, name).text)


def errors(folder: Path, *, short: int = 0) -> list[str]:
    """Return memcheck's errors in generated code that runs the graphs in a folder.

    Arguments:
        short: bytes by which outputs are made too short in one call more, to see it found.
    """
    report = folder / "report.xml"
    environment = {
        **os.environ,
        "FUSECELL_TARGET": LEVEL,
        "FUSECELL_CACHE": str(folder / "cache"),
        "PYTHONMALLOC": "malloc",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.reliability.memcheck_kernels", str(folder), str(short)]
    subprocess.run([*command[:-1], "0"], env=environment, check=True)  # so that valgrind needn't watch LLVM compile
    valgrind = ["valgrind", "--tool=memcheck", "--leak-check=no", "--xml=yes", f"--xml-file={report}"]
    subprocess.run([*valgrind, *command], env=environment, check=True, stdout=subprocess.DEVNULL)
    return [message for error in ElementTree.parse(report).iter("error") if (message := _of_ours(error))]


def _of_ours(error: ElementTree.Element) -> str:
    """Return an error as a line if it is in generated code, whose innermost frame is in no file; else ""."""
    kind = error.findtext("kind") or ""
    frame = error.find("stack/frame")
    unfinished = kind == "SyscallParam" and "write(buf)" in (error.findtext("what") or "")
    if unfinished or (frame is not None and frame.find("obj") is None):
        what = error.findtext("what") or error.findtext("xwhat/text") or ""
        return f"{kind}: {what} {error.findtext('auxwhat') or ''}".strip()
    return ""


def check() -> list[str]:
    """Everything anew, in a folder of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_graphs(folder)
        return errors(folder)


if __name__ == "__main__":
    problems = check()
    print("\n".join(problems) or "memcheck has nothing against generated code")
    sys.exit(bool(problems))
