"""The equations beside recorded values: each name stands for what is recorded under it."""

import re

import torch

import fusecell as fc


def test_no_equation_applies_a_function_to_a_gate(zoo_cell):
    """A gate is recorded after its sigmoid, so that an equation with σ(f) would put it through another."""
    cell = zoo_cell.make(4, 6)
    inputs = [torch.randn(3, 1, 4)] * len(cell.inputs) if isinstance(cell.input_size, int) else []
    if len(inputs) != 1:
        return
    ((_, _, track),) = fc.record(fc.Recurrent(cell), *inputs).tracks()
    recorded = set(track.values) - set(track.states)
    applied = re.findall(r"(?:σ|tanh|relu)\(([a-z]+)'?\)", track.equation or "")
    assert recorded.isdisjoint(applied)
