"""Hold every contestant to a level of CPUs, to see on one machine what another will do: ``--level x86-64-v3`` is AVX2.

Call :func:`hold` before a framework is imported: most of them read the environment once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

__all__ = ["LEVELS", "UNHELD", "hold"]

LEVELS: Mapping[str, Mapping[str, str]] = {
    "x86-64-v2": {
        "FUSECELL_TARGET": "x86-64-v2",
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2",
    },
    "x86-64-v3": {
        "FUSECELL_TARGET": "x86-64-v3",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
    },
}
"""What to set for each level: torch's own kernels, oneDNN's, MKL's and XLA's have a variable each."""
UNHELD = ("ONNX Runtime", "OpenVINO")
"""Peers that no variable is known to hold: they run what the CPU has, and have a mark in the tables."""


def hold(level: str) -> None:
    """Set the environment for a level, beside what ``XLA_FLAGS`` has already.

    Arguments:
        level: one of `LEVELS`.
    """
    variables = dict(LEVELS[level])
    variables["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {variables['XLA_FLAGS']}".strip()
    os.environ.update(variables)
