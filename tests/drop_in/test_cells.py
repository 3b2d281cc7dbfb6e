"""RNNCell, GRUCell and LSTMCell against torch.nn's."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call

import fusecell as fc

KINDS = {
    "tanh": (fc.RNNCell, nn.RNNCell, {}),
    "relu": (fc.RNNCell, nn.RNNCell, {"nonlinearity": "relu"}),
    "gru": (fc.GRUCell, nn.GRUCell, {}),
    "lstm": (fc.LSTMCell, nn.LSTMCell, {}),
}
LAYERS = {"tanh": nn.RNN, "relu": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _eager():
    with fc.runner("eager"):
        yield


def pair(kind, input_size=5, hidden_size=7, **options):
    cell_class, torch_class, extra = KINDS[kind]
    cells = []
    for cls in (cell_class, torch_class):
        torch.manual_seed(3)
        cells.append(cls(input_size, hidden_size, **extra, **options))
    return cells


def tensors(value):
    return [value] if isinstance(value, torch.Tensor) else list(value)


def state_for(kind, *shape, dtype=torch.float32):
    values = tuple(torch.randn(*shape, dtype=dtype, requires_grad=True) for _ in range(2))
    return values if kind == "lstm" else values[0]


def assert_close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if expected.numel():
        scale = max(expected.abs().max().item(), 1e-3)
        assert (actual - expected).abs().max().item() <= tolerance * scale


@every_kind
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_state", [True, False], ids=["hx", "zeros"])
@pytest.mark.parametrize("rows", [(), (0,), (1,), (6,)], ids=["unbatched", "N0", "N1", "N6"])
def test_one_step_and_its_gradients_are_torchs(kind, bias, dtype, with_state, rows):
    drop_in, reference = pair(kind, bias=bias, dtype=dtype)
    torch.manual_seed(0)
    x = torch.randn(*rows, 5, dtype=dtype, requires_grad=True)
    hx = state_for(kind, *rows, 7, dtype=dtype) if with_state else None
    results = []
    for cell in (drop_in, reference):
        after = tensors(cell(x, hx))
        loss = sum((value * torch.linspace(0.5, 2, 7, dtype=dtype)).sum() for value in after)
        sources = [x, *(tensors(hx) if with_state else []), *cell.parameters()]
        results.append(after + list(torch.autograd.grad(loss, sources)))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, TOLERANCE[dtype])


@every_kind
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("hidden_size", [16, 48, 64])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_eager_loop_is_torchs_to_the_bit(kind, dtype, hidden_size, rows):
    drop_in, reference = pair(kind, 5, hidden_size, dtype=dtype)
    x = torch.randn(20, rows, 5, dtype=dtype)
    hx, expected = None, []
    for step in x:
        hx = reference(step, hx)
        expected.append(tensors(hx)[0])
    outputs, state = fc.Recurrent(drop_in)(x)
    assert torch.equal(outputs, torch.stack(expected))
    for actual, last in zip(tensors(state), tensors(hx), strict=True):
        assert torch.equal(actual, last)


@every_kind
@pytest.mark.parametrize("bias", [True, False])
def test_parameters_are_torchs_to_the_bit(kind, bias):
    drop_in, reference = pair(kind, bias=bias)
    assert list(dict(drop_in.named_parameters())) == list(dict(reference.named_parameters()))
    assert list(drop_in.state_dict()) == list(reference.state_dict())
    for actual, expected in zip(drop_in.parameters(), reference.parameters(), strict=True):
        assert torch.equal(actual, expected)
    assert (drop_in.bias_ih is None) == (not bias)
    assert repr(drop_in) == repr(reference)
    assert isinstance(drop_in, type(reference))
    assert isinstance(drop_in, fc.Cell)


def test_repr_names_what_is_not_torchs():
    assert repr(fc.GRUCell(3, 4, reset_after=False)) == "GRUCell(3, 4, reset_after=False)"
    assert repr(fc.LSTMCell(3, 4, False, proj_size=2)) == "LSTMCell(3, 4, bias=False, proj_size=2)"


@pytest.mark.parametrize("bias", [True, False])
def test_a_projected_cell_is_the_one_layer_lstm(bias):
    torch.manual_seed(3)
    cell = fc.LSTMCell(5, 7, bias, dtype=torch.float64, proj_size=3)
    torch.manual_seed(3)
    layer = nn.LSTM(5, 7, bias=bias, dtype=torch.float64, proj_size=3)
    for actual, expected in zip(cell.parameters(), layer.parameters(), strict=True):
        assert torch.equal(actual, expected)
    x, h, c = (torch.randn(2, size, dtype=torch.float64) for size in (5, 3, 7))
    expected, (_, c_n) = layer(x[None], (h[None], c[None]))
    actual = cell(x, (h, c))
    assert cell.state_sizes == (3, 7)
    assert cell.output_size == 3
    assert_close(actual[0], expected[0], 1e-12)
    assert_close(actual[1], c_n[0], 1e-12)


def test_resetting_parameters_keeps_the_parameter_objects():
    cell = fc.LSTMCell(5, 7, proj_size=3)
    before = list(cell.parameters())
    values = [value.clone() for value in before]
    cell.reset_parameters()
    assert all(new is old for new, old in zip(cell.parameters(), before, strict=True))
    assert all(not torch.equal(new, old) for new, old in zip(before, values, strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_reset_before_the_product_follows_the_original_equation(bias):
    torch.manual_seed(0)
    cell = fc.GRUCell(5, 7, bias, dtype=torch.float64, reset_after=False)
    x, h = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    w_r, w_z, w_n = cell.weight_ih.chunk(3)
    u_r, u_z, u_n = cell.weight_hh.chunk(3)
    zero = torch.zeros(21, dtype=torch.float64)
    b_r, b_z, b_n = ((cell.bias_ih + cell.bias_hh) if bias else zero).chunk(3)
    r = torch.sigmoid(x @ w_r.T + h @ u_r.T + b_r)
    z = torch.sigmoid(x @ w_z.T + h @ u_z.T + b_z)
    n = torch.tanh(x @ w_n.T + (r * h) @ u_n.T + b_n)
    assert_close(cell(x, h), (1 - z) * n + z * h, 1e-14)


@every_kind
def test_state_dicts_go_both_ways_between_torch_a_cell_and_a_layer(kind):
    drop_in, reference = pair(kind)
    extra = KINDS[kind][2]
    layer, torch_layer = LAYERS[kind](5, 7, **extra), LAYERS[kind](5, 7, **extra)
    reference.load_state_dict(drop_in.state_dict())
    drop_in.load_state_dict(reference.state_dict())
    drop_in.load_state_dict(layer.state_dict())
    for name, value in drop_in.state_dict().items():
        assert torch.equal(value, layer.state_dict()[f"{name}_l0"])
    dropped_in = getattr(fc, type(layer).__name__)(5, 7, **extra)
    dropped_in.load_state_dict(drop_in.state_dict())
    torch_layer.load_state_dict(dropped_in.state_dict())
    for actual, expected in zip(torch_layer.parameters(), layer.parameters(), strict=True):
        assert torch.equal(actual, expected)


def test_a_layers_state_dict_loads_into_a_cell_inside_a_model():
    model = nn.ModuleDict({"rnn": fc.GRUCell(5, 7)})
    source = nn.ModuleDict({"rnn": nn.GRU(5, 7)})
    for target in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(target.load_state_dict(source.state_dict()))
        assert torch.equal(target["rnn"].weight_hh, source["rnn"].weight_hh_l0)
        target.load_state_dict(source.state_dict(), assign=True)
    assert list(source.state_dict()) == [f"rnn.{name}_l0" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"bidirectional": True}])
def test_strict_loading_still_refuses_what_is_not_one_layer(options):
    with pytest.raises(RuntimeError, match="Unexpected key"):
        fc.GRUCell(5, 7).load_state_dict(nn.GRU(5, 7, **options).state_dict())
    cell = fc.GRUCell(5, 7)
    before = cell.weight_ih.clone()
    cell.load_state_dict(nn.GRU(5, 7, **options).state_dict(), strict=False)
    assert torch.equal(cell.weight_ih, before)


def test_strict_loading_still_refuses_unknown_and_missing_keys():
    state = nn.GRU(5, 7).state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "gamma"'):
        fc.GRUCell(5, 7).load_state_dict({**state, "gamma": torch.ones(1)})
    del state["bias_hh_l0"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "bias_hh"'):
        fc.GRUCell(5, 7).load_state_dict(state)


@every_kind
def test_copies_compute_the_same(kind):
    cell, _ = pair(kind)
    buffer = io.BytesIO()
    torch.save(cell, buffer)
    buffer.seek(0)
    x = torch.randn(3, 5)
    expected = tensors(cell(x))
    for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell)), torch.load(buffer, weights_only=False)):
        assert all(map(torch.equal, tensors(other(x)), expected))


def test_weights_put_in_from_outside_are_seen():
    drop_in, reference = pair("gru")
    x, h = torch.randn(3, 5), torch.randn(3, 7)
    other = {name: torch.randn_like(value) for name, value in reference.state_dict().items()}
    assert_close(functional_call(drop_in, other, (x, h)), functional_call(reference, other, (x, h)), 1e-6)
    for cell in (drop_in, reference):
        nn.utils.parametrizations.weight_norm(cell, "weight_hh")
        cell.parametrizations.weight_hh.original0.data.mul_(2)
    assert_close(drop_in(x, h), reference(x, h), 1e-6)


def test_the_new_state_shares_memory_with_nothing():
    cell = fc.LSTMCell(5, 7)
    x, state = torch.randn(3, 5), (torch.randn(3, 7), torch.randn(3, 7))
    h, c = cell(x, state)
    expected = torch.autograd.grad(sum(value.sum() for value in cell(x, state)), cell.weight_hh)[0]
    loss = h.sum() + c.sum()
    h.detach().mul_(3)
    c.detach().mul_(3)
    assert torch.equal(torch.autograd.grad(loss, cell.weight_hh)[0], expected)
    assert len({value.untyped_storage().data_ptr() for value in (x, *state, h, c)}) == 5


@every_kind
def test_the_meta_device_gives_shapes(kind):
    drop_in, reference = (cell.to("meta") for cell in pair(kind))
    x = torch.empty(3, 5, device="meta")
    actual, expected = tensors(drop_in(x)), tensors(reference(x))
    assert [value.shape for value in actual] == [value.shape for value in expected]
    assert all(value.device.type == "meta" for value in actual)
    with pytest.raises(RuntimeError, match="mat1 and mat2 must have the same dtype, but got Double and Float"):
        drop_in(x.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_autocast_computes_in_the_weights_dtype(dtype):
    cell = fc.GRUCell(5, 7)
    x, h = torch.randn(3, 5).to(dtype), torch.randn(3, 7)
    with torch.autocast("cpu", torch.bfloat16):
        actual = cell(x, h)
    assert torch.equal(actual, cell(x.float(), h))


def test_a_cell_of_ones_own_on_top_keeps_its_step():
    class Negated(fc.GRUCell):
        def step(self, x, state):
            output, (h,) = super().step(x, state)
            return -output, (-h,)

    cell = Negated(5, 7)
    x = torch.randn(3, 5)
    plain = nn.GRUCell(5, 7)
    plain.load_state_dict(cell.state_dict())
    assert_close(cell(x), -plain(x), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("passed", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["GRUCell", "LSTMCell", "RNNCell"])
def test_autocast_returns_torchs_dtype(kind, passed, dtype):
    torch.manual_seed(0)
    ours, theirs = getattr(fc, kind)(5, 9), getattr(nn, kind)(5, 9)
    theirs.load_state_dict(ours.state_dict())
    x, state = torch.randn(3, 5).to(dtype), None
    if passed is not None:
        state = torch.randn(3, 9).to(passed)
        state = (state, state) if kind == "LSTMCell" else state
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results, expected = ours(x, state), theirs(x, state)
    for one, two in zip(
        *((value,) if isinstance(value, torch.Tensor) else value for value in (results, expected)), strict=True
    ):
        assert one.dtype == two.dtype
        torch.testing.assert_close(one.float(), two.float(), rtol=0.03, atol=0.03)  # theirs are products in bfloat16
    ours.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which leaves float64 alone
        after = ours(x.double())
    assert (after if isinstance(after, torch.Tensor) else after[0]).dtype == torch.float64
