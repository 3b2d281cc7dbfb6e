"""RNN, GRU and LSTM against torch.nn's, and what they add against a plain loop over torch.nn's cells."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusecell as fc

INPUT, HIDDEN, STEPS, ROWS = 5, 7, 6, 4
KINDS = {
    "tanh": (fc.RNN, nn.RNN, {}),
    "relu": (fc.RNN, nn.RNN, {"nonlinearity": "relu"}),
    "gru": (fc.GRU, nn.GRU, {}),
    "lstm": (fc.LSTM, nn.LSTM, {}),
    "projected": (fc.LSTM, nn.LSTM, {"proj_size": 3}),
}
OPTIONS = {
    "plain": {},
    "bias-free": {"bias": False},
    "two-layers": {"num_layers": 2, "batch_first": True},
    "both-ways": {"bidirectional": True},
    "dropout": {"num_layers": 3, "dropout": 0.4},
    "all": {"num_layers": 2, "bias": False, "batch_first": True, "dropout": 0.25, "bidirectional": True},
}
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # torch's own
every_kind = pytest.mark.parametrize("kind", KINDS)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture(autouse=True)
def _eager():
    with fc.runner("eager"):
        yield


def pair(kind, **options):
    layer_class, torch_class, extra = KINDS[kind]
    layers = []
    for cls in (layer_class, torch_class):
        torch.manual_seed(3)
        layers.append(cls(INPUT, HIDDEN, **extra, **options))
    return layers


def tensors(value):
    return [value] if isinstance(value, torch.Tensor) else list(value)


def hidden(layer, *rows, dtype):
    """A random hx for a layer, requiring gradients."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = (layer.proj_size or HIDDEN, HIDDEN)[: 2 if layer.mode == "LSTM" else 1]
    values = tuple(torch.randn(count, *rows, size, dtype=dtype, requires_grad=True) for size in sizes)
    return values if len(values) > 1 else values[0]


def assert_close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if expected.numel():
        scale = max(expected.abs().max().item(), 1e-3)
        assert (actual - expected).abs().max().item() <= tolerance * scale


def data_of(outputs):
    return outputs.data if isinstance(outputs, PackedSequence) else outputs


def run_and_differentiate(layer, x, form, hx):
    """Outputs, states and the gradients of a weighted sum of both."""
    torch.manual_seed(11)
    outputs, after = layer(given_as(form, x, layer.batch_first), hx)
    results = [data_of(outputs), *tensors(after)]
    loss = sum((value * torch.linspace(0.5, 2, value.shape[-1], dtype=value.dtype)).sum() for value in results)
    sources = [x, *([] if hx is None else tensors(hx)), *layer.parameters()]
    return results + list(torch.autograd.grad(loss, sources))


def given_as(form, x, batch_first):
    if form == "sorted":
        return pack_padded_sequence(x, [6, 4, 4, 1], batch_first=batch_first)
    if form == "unsorted":
        return pack_padded_sequence(x, [4, 1, 6, 4], batch_first=batch_first, enforce_sorted=False)
    return x


@every_kind
@every_option
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("form", ["padded", "unbatched", "sorted", "unsorted"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("with_hx", [True, False], ids=["hx", "zeros"])
def test_outputs_states_and_gradients_are_torchs(kind, options, dtype, form, training, with_hx):
    drop_in, reference = (layer.to(dtype).train(training) for layer in pair(kind, **options))
    rows = () if form == "unbatched" else (ROWS,)
    shape = (*rows, STEPS) if drop_in.batch_first else (STEPS, *rows)
    x = torch.randn(*shape, INPUT, dtype=dtype, requires_grad=True)
    hx = hidden(drop_in, *rows, dtype=dtype) if with_hx else None
    results = run_and_differentiate(drop_in, x, form, hx)
    expected = run_and_differentiate(reference, x, form, hx)
    for value, expected_value in zip(results, expected, strict=True):
        assert_close(value, expected_value, TOLERANCE[dtype])


@pytest.mark.parametrize("form", ["sorted", "unsorted"])
def test_a_packed_sequence_comes_back_in_its_own_order(form):
    drop_in, reference = pair("gru")
    packed = given_as(form, torch.randn(STEPS, ROWS, INPUT), False)
    for actual, expected in zip(drop_in(packed)[0][1:], reference(packed)[0][1:], strict=True):
        assert actual is expected or torch.equal(actual, expected)


@every_kind
@every_option
def test_parameters_attributes_and_repr_are_torchs(kind, options):
    drop_in, reference = pair(kind, **options)
    assert list(drop_in.state_dict()) == list(reference.state_dict())
    for name, value in reference.state_dict().items():
        assert torch.equal(drop_in.state_dict()[name], value)
    assert repr(drop_in) == repr(reference)
    assert isinstance(drop_in, type(reference))
    for name in (*nn.RNNBase.__constants__, "mode", "_flat_weights_names", "_all_weights"):
        assert getattr(drop_in, name) == getattr(reference, name)
    assert drop_in.flatten_parameters() is None
    for actual, expected in zip(drop_in.all_weights, reference.all_weights, strict=True):
        assert all(map(torch.equal, actual, expected))
    assert all(weight is value for weight, value in zip(drop_in._flat_weights, drop_in.parameters(), strict=True))
    assert [w.dtype for w in drop_in.half()._flat_weights] == [torch.float16] * len(reference._flat_weights)
    index = torch.tensor([1, 0])
    hx = hidden(drop_in, 2, dtype=torch.float32)
    for actual, expected in zip(tensors(drop_in.permute_hidden(hx, index)), tensors(hx), strict=True):
        assert torch.equal(actual, expected[:, index])


def test_the_original_gru_is_named_and_computed():
    layer = fc.GRU(INPUT, HIDDEN, 2, reset_after=False)
    assert repr(layer) == "GRU(5, 7, num_layers=2, reset_after=False)"
    x = torch.randn(STEPS, ROWS, INPUT)
    expected = x
    for index in range(2):
        cell = fc.GRUCell(expected.shape[-1], HIDDEN, reset_after=False)
        cell.load_state_dict(
            {
                name.replace(f"_l{index}", ""): value
                for name, value in layer.state_dict().items()
                if name.endswith(f"_l{index}")
            }
        )
        hx, outputs = torch.zeros(ROWS, HIDDEN), []
        for step in expected:
            hx = cell(step, hx)
            outputs.append(hx)
        expected = torch.stack(outputs)
    assert_close(layer(x)[0], expected, 1e-6)


def test_leaf_cells_come_bottom_first_with_the_layers_weights():
    layer = fc.LSTM(INPUT, HIDDEN, 2, bidirectional=True, proj_size=3)
    cells = layer.eval().leaf_cells()
    assert [(index, direction) for index, direction, _ in cells] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [repr(cell) for _, _, cell in cells] == ["LSTMCell(5, 7, proj_size=3)"] * 2 + [
        "LSTMCell(6, 7, proj_size=3)"
    ] * 2
    assert cells[3][2].weight_hr is layer.weight_hr_l1_reverse
    assert not any(cell.training for _, _, cell in cells)
    assert [name for name, _ in layer.named_modules()] == [""]
    assert fc.GRU(INPUT, HIDDEN, bias=False).leaf_cells()[0][2].bias_hh is None


def test_a_leaf_cell_takes_other_weights_by_functional_call():
    layer, other = fc.GRU(INPUT, HIDDEN), nn.GRUCell(INPUT, HIDDEN)
    x, h = torch.randn(3, INPUT), torch.randn(3, HIDDEN)
    view = layer.leaf_cells()[0][2]
    assert_close(functional_call(view, other.state_dict(), (x, h)), other(x, h), 1e-6)
    assert view.weight_ih is layer.weight_ih_l0


# Lengths and resets


def loop(layer, x, lengths, resets, hx):
    """Every row by itself, step by step, through torch.nn.GRUCell."""
    steps, rows, _ = x.shape
    after = []
    for index in range(layer.num_layers):
        ways = []
        for suffix in ("", "_reverse")[: 2 if layer.bidirectional else 1]:
            cell = nn.GRUCell(x.shape[-1], HIDDEN, dtype=x.dtype)
            weights = {name: getattr(layer, f"{name}_l{index}{suffix}") for name in cell.state_dict()}
            columns = []
            for n in range(rows):
                h, outputs = hx[len(after) // rows, n], [x.new_zeros(HIDDEN)] * steps
                order = range(lengths[n])
                for t in reversed(order) if suffix else order:
                    h = torch.zeros_like(h) if resets[t, n] else h
                    h = outputs[t] = functional_call(cell, weights, (x[t, n], h))
                columns.append(torch.stack(outputs))
                after.append(h)
            ways.append(torch.stack(columns, 1))
        x = torch.cat(ways, -1)
    return x, torch.stack(after).reshape(-1, rows, HIDDEN)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["plain", "all"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_and_resets_are_a_plain_loops(options, batch_first):
    torch.manual_seed(0)
    layer = fc.GRU(INPUT, HIDDEN, batch_first=batch_first, dtype=torch.float64, **options)
    lengths = torch.tensor([3, 6, 0, 1, 5])
    resets = torch.rand(STEPS, 5) < 0.4
    x = torch.randn(STEPS, 5, INPUT, dtype=torch.float64, requires_grad=True)
    hx = hidden(layer, 5, dtype=torch.float64)
    sources = [x, hx, *layer.parameters()]
    sequence = x.transpose(0, 1) if batch_first else x
    outputs, after = layer(sequence, hx, lengths=lengths, resets=resets.T if batch_first else resets)
    outputs = outputs.transpose(0, 1) if batch_first else outputs
    results = [outputs, after, *torch.autograd.grad(outputs.square().sum() + after.sum(), sources)]
    outputs, after = loop(layer, x, lengths, resets, hx)
    expected = [outputs, after, *torch.autograd.grad(outputs.square().sum() + after.sum(), sources)]
    for value, expected_value in zip(results, expected, strict=True):
        assert_close(value, expected_value, 1e-12)


@every_kind
@every_option
def test_lengths_are_what_packing_gives(kind, options):
    drop_in, reference = (layer.double().eval() for layer in pair(kind, **options))
    lengths = [4, 1, 6, 3]
    shape = (ROWS, STEPS) if drop_in.batch_first else (STEPS, ROWS)
    x = torch.randn(*shape, INPUT, dtype=torch.float64)
    packed = pack_padded_sequence(x, lengths, drop_in.batch_first, enforce_sorted=False)
    expected, states = reference(packed)
    expected = nn.utils.rnn.pad_packed_sequence(expected, drop_in.batch_first)[0]
    for form in (lengths, torch.tensor(lengths, dtype=torch.int32)):
        outputs, after = drop_in(x, lengths=form)
        assert_close(outputs, expected, 1e-12)
        for last, expected_last in zip(tensors(after), tensors(states), strict=True):
            assert_close(last, expected_last, 1e-12)


def test_an_unbatched_sequence_takes_its_length_and_resets():
    layer = fc.GRU(INPUT, HIDDEN)
    x, resets = torch.randn(STEPS, INPUT), torch.tensor([False, False, True, False, True, False])
    outputs, after = layer(x, lengths=[4], resets=resets)
    expected, last = layer(x[2:4])
    assert torch.equal(outputs[2:4], expected)
    assert torch.equal(after, last)
    assert not outputs[4:].any()


@every_kind
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_padding_changes_no_result_or_gradient(kind, bad):
    layer, _ = pair(kind, num_layers=2, bidirectional=True)
    lengths = torch.tensor([4, 0, 6, 3])
    x = torch.randn(STEPS, ROWS, INPUT)
    results = []
    for filler in (0.0, bad):
        padded = torch.where((torch.arange(STEPS)[:, None] < lengths)[..., None], x, filler).requires_grad_()
        outputs, after = layer(padded, lengths=lengths)
        loss = outputs.square().sum() + sum(value.sum() for value in tensors(after))
        results.append([outputs, *tensors(after), *torch.autograd.grad(loss, [padded, *layer.parameters()])])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


# Sizes of zero, memory, devices


@every_kind
@every_option
def test_no_steps_give_no_outputs_and_the_given_state(kind, options):
    layer, _ = pair(kind, **options)
    directions = 2 if layer.bidirectional else 1
    x = torch.randn(*((ROWS, 0) if layer.batch_first else (0, ROWS)), INPUT)
    hx = hidden(layer, ROWS, dtype=torch.float32)
    outputs, after = layer(x, hx)
    assert outputs.shape == (*x.shape[:2], directions * (layer.proj_size or HIDDEN))
    for last, initial in zip(tensors(after), tensors(hx), strict=True):
        assert torch.equal(last, initial)
        assert last.data_ptr() != initial.data_ptr()
        assert torch.equal(torch.autograd.grad(last.sum(), initial)[0], torch.ones_like(initial))
    assert not any(value.any() for value in tensors(layer(x)[1]))
    assert layer(torch.randn(0, INPUT))[0].shape == (0, outputs.shape[-1])


@every_kind
@every_option
def test_no_rows_are_no_trouble(kind, options):
    drop_in, reference = pair(kind, **options)
    x = torch.randn(*((0, STEPS) if drop_in.batch_first else (STEPS, 0)), INPUT)
    actual, expected = drop_in(x), reference(x)
    assert actual[0].shape == expected[0].shape
    assert [value.shape for value in tensors(actual[1])] == [value.shape for value in tensors(expected[1])]
    actual[0].sum().backward()
    assert all(not value.grad.any() for value in drop_in.parameters())


@every_kind
@pytest.mark.parametrize("form", ["padded", "unsorted"])
def test_results_share_memory_with_nothing(kind, form):
    layer, _ = pair(kind, num_layers=2)
    x = torch.randn(STEPS, ROWS, INPUT)
    sequence, hx = given_as(form, x, False), hidden(layer, ROWS, dtype=torch.float32)
    before = [value.clone() for value in (data_of(sequence), *tensors(hx))]
    parameters = list(layer.parameters())
    expected = torch.autograd.grad(data_of(layer(sequence, hx)[0]).sum(), parameters)
    outputs, after = layer(sequence, hx)
    loss = data_of(outputs).sum()
    for value in (data_of(outputs), *tensors(after)):
        value.detach().fill_(3)
    assert all(map(torch.equal, torch.autograd.grad(loss, parameters), expected))
    assert all(map(torch.equal, (data_of(sequence), *tensors(hx)), before))


@every_kind
@pytest.mark.parametrize("form", ["padded", "unbatched"])
def test_the_meta_device_gives_shapes(kind, form):
    drop_in, reference = (layer.to("meta") for layer in pair(kind, num_layers=2, bidirectional=True))
    x = torch.empty(*((STEPS, ROWS) if form == "padded" else (STEPS,)), INPUT, device="meta")
    actual, expected = drop_in(x), reference(x)
    assert actual[0].device.type == "meta"
    assert actual[0].shape == expected[0].shape
    assert [value.shape for value in tensors(actual[1])] == [value.shape for value in tensors(expected[1])]


@pytest.mark.parametrize(
    ("options", "data"),
    [
        ({"reset_after": False}, {}),
        ({}, {"lengths": torch.empty(ROWS, dtype=torch.int64, device="meta")}),
        ({}, {"resets": torch.empty(STEPS, ROWS, dtype=torch.bool, device="meta")}),
    ],
    ids=["reset-before", "lengths", "resets"],
)
def test_the_meta_device_takes_what_torch_has_not(options, data):
    layer = fc.GRU(INPUT, HIDDEN, bidirectional=True, device="meta", **options)
    outputs, after = layer(torch.empty(STEPS, ROWS, INPUT, device="meta"), **data)
    assert outputs.device.type == after.device.type == "meta"
    assert outputs.shape == (STEPS, ROWS, 2 * HIDDEN)
    assert after.shape == (2, ROWS, HIDDEN)
    with pytest.raises(ValueError, match="does not match weight dtype"):
        layer(torch.empty(STEPS, ROWS, INPUT, device="meta", dtype=torch.float64))


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_autocast_computes_in_the_weights_dtype(kind, dtype):
    layer, _ = pair(kind, num_layers=2, bidirectional=True)
    x = torch.randn(STEPS, ROWS, INPUT).to(dtype)
    for sequence in (x, pack_padded_sequence(x, [6, 4, 4, 1])):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = data_of(layer(sequence, hidden(layer, ROWS, dtype=dtype))[0])
        assert outputs.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        outputs = layer(x)[0]
    assert torch.equal(outputs, layer(x.float())[0])


# Weights: where they come from, and that nothing keeps them


@every_kind
@every_option
def test_state_dicts_go_both_ways(kind, options):
    drop_in, reference = pair(kind, **options)
    for value in reference.parameters():
        nn.init.normal_(value)
    drop_in.load_state_dict(reference.state_dict())
    assert all(map(torch.equal, drop_in.parameters(), reference.parameters()))
    for value in drop_in.parameters():
        nn.init.normal_(value)
    reference.load_state_dict(drop_in.state_dict())
    assert all(map(torch.equal, drop_in.parameters(), reference.parameters()))


def test_a_cells_state_dict_loads_into_a_one_layer_layer_only():
    cell = nn.GRUCell(INPUT, HIDDEN)
    for source in (fc.GRU(INPUT, HIDDEN), copy.deepcopy(fc.GRU(INPUT, HIDDEN))):
        source.load_state_dict(cell.state_dict())
        assert torch.equal(source.bias_hh_l0, cell.bias_hh)
    model, cells = nn.ModuleDict({"rnn": source}), nn.ModuleDict({"rnn": cell})
    assert not any(model.load_state_dict(cells.state_dict()))
    for options in ({"num_layers": 2}, {"bidirectional": True}):
        with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "weight_ih"'):
            fc.GRU(INPUT, HIDDEN, **options).load_state_dict(cell.state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "gamma"'):
        source.load_state_dict({**cell.state_dict(), "gamma": torch.ones(1)})


@every_kind
def test_weights_put_in_from_outside_are_seen(kind):
    # In float64: with weights as large as these torch's own float32 is further from it than 1e-6.
    drop_in, reference = (layer.double() for layer in pair(kind, num_layers=2))
    x = torch.randn(STEPS, ROWS, INPUT, dtype=torch.float64)
    other = {name: torch.randn_like(value) for name, value in reference.state_dict().items()}
    assert_close(functional_call(drop_in, other, (x,))[0], functional_call(reference, other, (x,))[0], 1e-12)
    assert_close(drop_in(x)[0], reference(x)[0], 1e-12)
    for layer in (drop_in, reference):
        layer.weight_hh_l1.data.copy_(other["weight_hh_l1"])
        nn.utils.parametrizations.weight_norm(layer, "weight_ih_l0")
        layer.parametrizations.weight_ih_l0.original0.data.mul_(2)
    assert_close(drop_in(x)[0], reference(x)[0], 1e-12)
    actual, expected = (
        torch.autograd.grad(layer(x)[0].sum(), layer.parametrizations.weight_ih_l0.original1)[0]
        for layer in (drop_in, reference)
    )
    assert_close(actual, expected, 1e-12)


def test_a_replicas_plain_tensors_are_its_weights():
    layer = fc.GRU(INPUT, HIDDEN)
    replica = layer._replicate_for_data_parallel()
    for name, value in layer.named_parameters():
        setattr(replica, name, value * 2)
    doubled = nn.GRU(INPUT, HIDDEN)
    doubled.load_state_dict({name: value * 2 for name, value in layer.state_dict().items()})
    x = torch.randn(STEPS, ROWS, INPUT)
    outputs, _ = replica(x)
    assert_close(outputs, doubled(x)[0], 1e-6)
    assert torch.autograd.grad(outputs.sum(), layer.weight_hh_l0)[0].any()


def test_nothing_keeps_a_weight_after_the_call():
    layer = fc.GRU(INPUT, HIDDEN)
    weights = {name: torch.randn_like(value) for name, value in layer.named_parameters()}
    alive = [weakref.ref(value) for value in weights.values()]
    with torch.no_grad():
        functional_call(layer, weights, (torch.randn(STEPS, ROWS, INPUT),))
    del weights
    gc.collect()
    assert [reference() for reference in alive] == [None] * 4


@every_kind
def test_copies_compute_the_same_and_are_independent(kind):
    layer, _ = pair(kind, num_layers=2, bidirectional=True)
    x = torch.randn(STEPS, ROWS, INPUT)
    expected = layer(x)[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], expected)
        assert all(weight is value for weight, value in zip(other._flat_weights, other.parameters(), strict=True))
        other.weight_hh_l0.data.zero_()
        assert not torch.equal(other(x)[0], expected)
        assert torch.equal(layer(x)[0], expected)


def test_threads_calling_one_layer_are_independent():
    layer = fc.LSTM(INPUT, HIDDEN, 2)
    inputs = [torch.randn(STEPS, 1 + index % 3, INPUT) for index in range(12)]
    with torch.no_grad():
        expected = [layer(x)[0] for x in inputs]

    def call(x):
        with torch.no_grad(), fc.runner("eager"):
            return layer(x)[0]

    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(call, inputs), expected))


# torch's transforms


def test_vmap_maps_over_a_batch_of_batches():
    layer = fc.GRU(INPUT, HIDDEN, 2)
    x = torch.randn(3, STEPS, ROWS, INPUT)
    mapped = torch.func.vmap(lambda each: layer(each)[0])(x)
    assert_close(mapped, torch.stack([layer(each)[0] for each in x]), 1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, at first jvp
def test_forward_mode_and_double_backward_agree_with_torchs_backward():
    drop_in, reference = (layer.double() for layer in pair("gru"))
    x, v = torch.randn(2, STEPS, ROWS, INPUT, dtype=torch.float64)
    _, tangent = torch.func.jvp(lambda value: drop_in(value)[0], (x,), (v,))
    weight = torch.randn(STEPS, ROWS, HIDDEN, dtype=torch.float64)
    gradient = torch.func.grad(lambda value: (reference(value)[0] * weight).sum())(x)
    assert (tangent * weight).sum().item() == pytest.approx((gradient * v).sum().item(), rel=1e-10)
    second = []
    for layer in (drop_in, reference):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(layer(leaf)[0].square().sum(), leaf, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    assert_close(*second, 1e-10)


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_the_checks_of_a_subclass_are_called_as_torch_calls_them(kind):
    calls = {}

    def checked(base, name):
        class Checked(base):
            def check_forward_args(self, input, hidden, batch_sizes):
                hidden = hidden if isinstance(hidden, tuple) else (hidden,)
                shapes = [tuple(value.shape) for value in hidden]
                sizes = None if batch_sizes is None else batch_sizes.tolist()
                calls.setdefault(name, []).append((tuple(input.shape), shapes, sizes))
                if input.shape[0] > 20:
                    raise ValueError("at most 20 steps")

        return Checked

    for library in (fc, nn):
        layer = checked(getattr(library, kind), library.__name__)(5, 9, batch_first=False)
        x, state = torch.randn(7, 3, 5), torch.zeros(1, 3, 9)
        state = (state, state) if kind == "LSTM" else state
        for _ in range(2):  # the second time it would be a call like an earlier one
            layer(x)
        layer(x, state)
        layer(x[:, 0])
        layer(torch.nn.utils.rnn.pack_padded_sequence(x, [7, 4, 2]))
        with pytest.raises(ValueError, match="at most 20 steps"):
            layer(torch.randn(21, 3, 5))
    assert calls["fusecell"] == calls["torch.nn"]
    assert len(calls["fusecell"]) == (6 if kind == "GRU" else 5)  # torch.nn's LSTM calls them for tensors only
