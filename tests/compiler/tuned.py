"""Kernels and launches under other tuning constants."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fusecell.compiler.backend import tuning

__all__ = ["tuned"]


def tuned(patch: pytest.MonkeyPatch, **constants: float) -> None:
    """Replace some of the constants of `tuning.TUNING`."""
    patch.setattr(tuning, "TUNING", replace(tuning.TUNING, **constants))
