"""Graphs of steps that compute along axes, forward and backward, against torch in float64."""

from __future__ import annotations

import pytest
import torch

from fusecell.compiler.frontend import Traced, trace
from tests.compiler.axis_cells import AXES, AxisCell
from tests.compiler.traced_cells import compare


@pytest.mark.parametrize("name", AXES)
def test_steps_along_axes(name: str) -> None:
    compare(AxisCell(AXES[name]).double())


@pytest.mark.parametrize("name", AXES)
def test_they_are_traced_in_single_precision(name: str) -> None:
    result = trace(AxisCell(AXES[name]), [(5,)], torch.float32, gradients=True)
    assert isinstance(result, Traced), result
