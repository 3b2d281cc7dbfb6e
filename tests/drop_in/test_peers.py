"""The standard cells against others' implementations: ONNX Runtime, OpenVINO and JAX, with the same weights and input.

They are the peers of the benchmarks, ``pip install 'fusecell[peers]'``. ONNX's reference stands in
``test_reference_numbers.py``, torch.nn in ``test_drop_in_layers.py``.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.peers import PEERS, installed
from tests.paths import ROOT

CELLS = {
    "ONNX Runtime": {"inference": ("gru", "lstm", "rnn_tanh")},
    "OpenVINO": {"inference": ("gru", "lstm", "rnn_tanh")},
    "JAX": dict.fromkeys(("inference", "training"), ("gru", "lstm", "rnn_tanh", "gru_layer_norm", "ligru", "leaky")),
}
"""What each peer is asked for."""

SCRIPT = """
import json, sys
from benchmarks.measure import measure
from benchmarks.peers import PEERS
from benchmarks.shapes import Mode, Shape
[peer] = [peer for peer in PEERS if peer.name == sys.argv[1]]
figures = {}
for mode, cells in json.loads(sys.argv[2]).items():
    for cell in cells:
        # Odd sizes, a row alone and rows that fill no vector, few steps and many; of training the largest.
        shapes = (Shape(cell, 4, 1, 3, 10), Shape(cell, 7, 3, 64, 33), Shape(cell, 31, 5, 13, 17))
        for shape in shapes[-1:] if mode == "training" else shapes:
            row = measure(shape, Mode(mode), [peer], 1, 0.0)
            figures[f"{mode} {shape.name}"] = row.errors | ({"refused": row.refused} if row.refused else {})
print(json.dumps(figures))
"""


@pytest.mark.parametrize("name", CELLS)
def test_peers_compute_the_same(name):
    """In a new process, because the peers' threads don't survive the forks of other tests."""
    [peer] = [peer for peer in PEERS if peer.name == name]
    if not installed(peer):
        pytest.skip(f"needs {' and '.join(peer.packages)}: pip install 'fusecell[peers]'")
    command = [sys.executable, "-c", SCRIPT, name, json.dumps(CELLS[name])]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert process.returncode == 0, process.stderr
    figures = json.loads(process.stdout)
    assert len(figures) == sum(len(cells) * (1 if mode == "training" else 3) for mode, cells in CELLS[name].items())
    for shape, errors in figures.items():
        assert set(errors) == {"fusecell", name}, shape
        assert max(errors.values()) < 3e-6, f"{shape}: {errors}"
