"""Inputs and states in any memory layout give the results of their dense copies."""

from __future__ import annotations

import pytest
import torch

import fusecell as fc
from tests.compiler.fresh_cells import both, fresh_layer, weight_gradient


@pytest.mark.parametrize(
    "arranged",
    {
        "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "every second feature": lambda x: x.repeat_interleave(2, -1)[..., ::2],
        "features first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "one step for all": lambda x: x[:1].expand(x.shape),
        "one row for all": lambda x: x[:, :1].expand(x.shape),
        "one feature for all": lambda x: x[..., :1].expand(x.shape),
        "windows that overlap": lambda x: x.flatten()[:50].as_strided((6, 3, 5), (2, 7, 1)),
        "not at the start of its memory": lambda x: torch.cat((x.new_zeros(3), x.flatten()))[3:].view(x.shape),
    }.items(),
    ids=lambda item: item[0],
)
def test_layouts(arranged):
    layer = fresh_layer()
    x = arranged[1](torch.randn(6, 3, 5))
    with torch.no_grad():
        with fc.runner("compiled"):
            assert torch.equal(layer(x)[0], layer(x.contiguous())[0])
        compiled, loop = both(layer, x)
    torch.testing.assert_close(compiled, loop)
    assert torch.equal(weight_gradient(layer, x), weight_gradient(layer, x.contiguous()))


def test_states_in_any_layout():
    cell, x = fc.LSTMCell(5, 9), torch.randn(6, 3, 5)
    plain = (torch.randn(3, 9), torch.randn(3, 9))
    strange = (plain[0].t().contiguous().t(), plain[1].repeat_interleave(2, 1)[:, ::2])
    with fc.runner("compiled"):
        for actual, expected in zip(fc.scan(cell, x, strange)[1], fc.scan(cell, x, plain)[1], strict=True):
            assert torch.equal(actual, expected)
