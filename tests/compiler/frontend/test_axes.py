"""Graphs of steps that compute along axes, forward and backward, against torch in float64."""

from __future__ import annotations

import pytest
import torch

from fusecell.compiler.frontend import Traced, trace
from tests.compiler.axis_cells import AXES, AxisCell, fit, heads
from tests.compiler.traced_cells import compare


@pytest.mark.parametrize("name", AXES)
def test_steps_along_axes(name: str) -> None:
    compare(AxisCell(AXES[name]).double())


@pytest.mark.parametrize("name", AXES)
def test_they_are_traced_in_single_precision(name: str) -> None:
    result = trace(AxisCell(AXES[name]), [(5,)], torch.float32, gradients=True)
    assert isinstance(result, Traced), result


@pytest.mark.filterwarnings("ignore:index_reduce")  # torch calls it a beta
@pytest.mark.parametrize("how", ["mean", "prod", "amax"])
def test_values_reduced_at_positions(how: str) -> None:
    def body(cell, z):
        places = cell.order[:5] % 8
        return fit(heads(z).index_reduce(2, places, heads(z)[..., 3:].sin(), how, include_self=how == "amax"))

    compare(AxisCell(body).double())
