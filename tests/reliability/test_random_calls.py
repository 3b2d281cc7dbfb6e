"""Calls of every form, compiled against the Python loop; and the same bits on any number of threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

import fusecell as fc
from tests.reliability.random_calls import calls, check


@seed(1)
@settings(
    max_examples=100,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(calls())
def test_any_call(call):
    check(call)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_same_bits_on_any_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.manual_seed(3)
    layer, x = fc.LSTM(37, 61), torch.randn(83, 29, 37)
    found = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            layer.zero_grad()
            y, _ = layer(x)
            y.square().sum().backward()
            found.append([y, *(parameter.grad.clone() for parameter in layer.parameters())])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
