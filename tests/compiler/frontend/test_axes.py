"""Graphs of steps that compute along axes, forward and backward, against torch in float64."""

from __future__ import annotations

import pytest

from tests.compiler.axis_cells import AXES, AxisCell
from tests.compiler.traced_cells import compare


@pytest.mark.parametrize("name", AXES)
def test_steps_along_axes(name: str) -> None:
    compare(AxisCell(AXES[name]).double())
