"""Calls of every form, drawn at random, compiled against the Python loop: outputs, states, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusecell as fc

CELLS = [fc.GRUCell, fc.LSTMCell, fc.RNNCell, fc.cells.LayerNormGRUCell, fc.cells.MGUCell]


def laid_out(value, how):
    """The same numbers in another place: strides, offsets, views."""
    if how == "transposed":
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "sliced":
        wide = torch.full((*value.shape[:-1], value.shape[-1] + 3), float("nan"), dtype=value.dtype)
        wide[..., 1 : 1 + value.shape[-1]] = value
        return wide[..., 1 : 1 + value.shape[-1]]
    if how == "stepped":
        wide = torch.full((2 * value.shape[0], *value.shape[1:]), float("nan"), dtype=value.dtype)
        wide[::2] = value
        return wide[::2]
    return value


LAYOUTS = st.sampled_from(["plain", "transposed", "sliced", "stepped"])


@st.composite
def calls(draw):
    steps, rows = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    sizes = draw(st.integers(1, 19)), draw(st.integers(1, 19))
    return {
        "kind": draw(st.sampled_from(CELLS)),
        "sizes": sizes,
        "shape": (steps, rows),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "layout": draw(LAYOUTS),
        "state": draw(st.sampled_from([None, "plain", "transposed", "sliced", "stepped"])),
        "lengths": draw(st.none() | st.lists(st.integers(0, steps), min_size=rows, max_size=rows)),
        "resets": draw(st.none() | st.lists(st.booleans(), min_size=steps * rows, max_size=steps * rows)),
        "wants": tuple(draw(st.booleans()) for _ in range(3)),  # the input, the state, the parameters
        "options": {name: draw(st.booleans()) for name in ("batch_first", "reverse", "recompute")},
        "seed": draw(st.integers(0, 99)),
    }


def run(call, name):
    torch.manual_seed(call["seed"])
    layer = fc.Recurrent(call["kind"](*call["sizes"], dtype=call["dtype"]), **call["options"])
    (steps, rows), dtype = call["shape"], call["dtype"]
    wants_x, wants_state, wants_weights = call["wants"]
    layer.requires_grad_(wants_weights)
    shape = (rows, steps) if call["options"]["batch_first"] else (steps, rows)
    x = laid_out(torch.randn(*shape, call["sizes"][0], dtype=dtype), call["layout"]).requires_grad_(wants_x)
    data, state = {}, ()
    if call["state"] is not None:
        state = tuple(
            laid_out(torch.randn(rows, size, dtype=dtype), call["state"]).requires_grad_(wants_state)
            for size in layer.cell.state_sizes
        )
    if call["lengths"] is not None:
        data["lengths"] = torch.tensor(call["lengths"])
    if call["resets"] is not None:
        data["resets"] = torch.tensor(call["resets"]).reshape(shape)
    with fc.runner(name):
        y, after = layer(x, (state if len(state) > 1 else state[0]) if state else None, **data)
    found = [y, *(after if isinstance(after, tuple) else (after,))]
    leaves = [value for value in (x, *state, *layer.parameters()) if value.requires_grad]
    if leaves and y.requires_grad:
        loss = sum((value * torch.linspace(-1, 1, value.numel(), dtype=dtype).view_as(value)).sum() for value in found)
        found += torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [value.detach() for value in found]


@given(calls())
def test_any_call(call):
    tolerance = 2e-4 if call["dtype"] is torch.float32 else 1e-10
    for mine, theirs in zip(run(call, "compiled"), run(call, "eager"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


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
