"""The line that says what is being compiled, where that takes a while."""

from __future__ import annotations

import time

import torch

import fusecell as fc
from fusecell.compiler.programs import progress


def test_a_slow_compilation_is_named_once(capfd, monkeypatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.01)
    with progress.told_if_slow("Slow"):
        time.sleep(0.3)
    assert capfd.readouterr().err == (
        "fusecell: compiling Slow, which takes a while; its machine code is kept for the next process.\n"
    )


def test_nothing_is_said_of_others(capfd) -> None:
    with fc.runner("compiled"):
        fc.scan(fc.cells.MGUCell(3, 5), torch.zeros(2, 1, 3))
    assert capfd.readouterr().err == ""
