"""The short form of ``scripts/published_cells.py``: three families of cells, as packages and papers have them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.parametrize("family", ["normed", "complex", "oscillators"])
def test_published_cells_are_compiled_and_right(family):
    command = [sys.executable, ROOT / "scripts" / "published_cells.py", "--family", family]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    cases, inference, training, both, right = map(int, run.stdout.partition("\nall ")[2].split("\n")[0].split())
    assert cases == inference == training == both == right >= 4
