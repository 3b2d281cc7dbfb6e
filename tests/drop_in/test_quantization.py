"""torch.ao.quantization finds the drop-ins by torch.nn's classes, and leaves those that it has no settings for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusecell as fc

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

quantize_dynamic = torch.ao.quantization.quantize_dynamic


def test_only_what_is_asked_for_is_quantized():
    model = nn.ModuleDict(
        {"gru": fc.GRU(5, 8, recompute=True), "lstm": fc.LSTM(5, 8, tbptt=3), "cell": fc.GRUCell(5, 8)}
    )
    small = quantize_dynamic(model, {nn.LSTM, nn.GRUCell})
    # tbptt acts on gradients, of which a quantized layer has none.
    assert [type(part).__module__.split(".")[0] for part in small.values()] == ["fusecell", "torch", "torch"]
    assert type(small["gru"]) is fc.GRU
    assert small["gru"].recompute is True
    assert [type(part) for part in model.values()] == [fc.GRU, fc.LSTM, fc.GRUCell]
    assert not any(hasattr(part, "qconfig") for part in model.values())
    small["gru"](torch.randn(7, 3, 5), lengths=[7, 1, 2])


def test_another_equation_is_not_quantized():
    model = nn.Sequential(fc.GRU(5, 8, reset_after=False))
    assert type(quantize_dynamic(model, {nn.GRU})[0]) is fc.GRU


def test_a_model_that_is_quantized_in_place():
    torch.manual_seed(0)
    model, x = nn.Sequential(fc.LSTM(5, 8)), torch.randn(7, 3, 5)
    before = model(x)[0]
    quantize_dynamic(model, {nn.LSTM}, inplace=True)
    torch.testing.assert_close(model(x)[0], before, rtol=0, atol=0.05)
    assert "quantized" in type(model[0]).__module__
