"""States, inputs and outputs of any rank, compiled and in the loop, against a cell that has the same rows flat."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fusecell as fc
from fusecell.errors import StreamFileError
from fusecell.shapes import feature_shape, is_size, output_shapes, packed, unpacked
from fusecell.streaming.file import digest
from fusecell.tensor_file import read_tensor_file

DTYPE = torch.float64
DIMS = st.lists(st.integers(1, 4), max_size=4).map(tuple)


class Flat(fc.Cell):
    """A matrix and a vector as flat rows: what the shaped cells below must equal."""

    states = ("m", "h")

    def __init__(self, count: int, size: int) -> None:
        super().__init__(count, size)
        self.state_sizes = (count, size)
        self.output_size = count
        self.gain = nn.Parameter(torch.linspace(-1, 1, count, dtype=DTYPE))
        self.lin = nn.Linear(count, size, dtype=DTYPE)

    def step(self, x, state):
        m, h = state
        m = torch.tanh(self.gain * m + x)
        h = torch.tanh(self.lin(m) + h)
        return m * h[:, :1], (m, h)


class Shaped(Flat):
    """The same, where a row of the matrix has a shape; outputs in one of the forms "tensor", "tuple" and "dict"."""

    def __init__(self, shape: tuple[int, ...], size: int, form: str = "tensor") -> None:
        super().__init__(math.prod(shape), size)
        self.input_size = shape
        self.state_sizes = (shape, size)
        self.shape = shape
        sizes = {"tensor": shape, "tuple": (shape, (size,), ()), "dict": {"a": shape, "h": size, "first": ()}}
        self.output_size = sizes[form]
        self.form = form

    def step(self, x, state):
        m, h = state
        for value in (x, m):
            assert value.shape[1:] == self.shape
        m = torch.tanh(self.gain.reshape(self.shape) * m + x)
        h = torch.tanh(self.lin(m.reshape(-1, self.lin.in_features)) + h)
        output = m * h[:, :1].reshape(-1, *[1] * len(self.shape))
        if self.form == "tensor":
            return output, (m, h)
        # Not in the order of output_size, which alone decides.
        several = {"first": h[:, 0], "h": h, "a": output}
        return (several if self.form == "dict" else (output, h, h[:, 0])), (m, h)


class Tokens(fc.Cell):
    """Looks its ids up in a table: (N,) or (N, k) of them."""

    def __init__(self, input_size, count: int = 11, size: int = 6, dtype: torch.dtype = DTYPE) -> None:
        super().__init__(input_size, size)
        self.table = nn.Embedding(count, size, dtype=dtype)
        self.rec = nn.Linear(size, size, dtype=dtype)

    def step(self, x, state):
        row = self.table(x)
        h = torch.tanh((row if row.dim() == 2 else row.sum(1)) + self.rec(state[0]))
        return h, (h,)


SHAPED = Shaped((2, 3), 4)


def results(layer: nn.Module, x: Tensor, state=None, **data) -> list[Tensor]:
    """Return outputs, states and all gradients of a call."""
    outputs, after = layer(x, state, **data)
    values = outputs if isinstance(outputs, dict) else {"": outputs}
    each = [value for part in values.values() for value in (part if isinstance(part, tuple) else (part,))]
    each += [after] if isinstance(after, Tensor) else after
    leaves = [value for value in (x, *(state or ()), *layer.parameters()) if value.requires_grad]
    loss = sum(((value + 0.3) ** 2).sum() for value in each)
    return [*each, *torch.autograd.grad(loss, leaves)]


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(shape=DIMS, form=st.sampled_from(["tensor", "tuple", "dict"]), data=st.data())
def test_rows_of_any_rank_equal_the_loop(shape, form, data):
    torch.manual_seed(len(shape))
    steps, rows = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    layer = fc.Recurrent(
        Shaped(shape, 3, form),
        batch_first=data.draw(st.booleans()),
        reverse=data.draw(st.booleans()),
        recompute=data.draw(st.booleans()),
    )
    x = torch.randn(steps, rows, *shape, dtype=DTYPE)
    state = torch.randn(rows, *shape, dtype=DTYPE), torch.randn(rows, 3, dtype=DTYPE)
    flags = {name: torch.rand(steps, rows) < 0.6 for name in ("resets", "mask") if data.draw(st.booleans())}
    lengths = torch.randint(0, steps + 1, (rows,)) if data.draw(st.booleans()) else None
    if layer.batch_first:
        x, flags = x.transpose(0, 1), {name: value.t() for name, value in flags.items()}
    x, state = x.requires_grad_(), tuple(value.requires_grad_() for value in state)
    calls = []
    for runner in ("compiled", "eager"):
        with fc.runner(runner):
            calls.append(results(layer, x, state, lengths=lengths, **flags))
    assert_close(*calls)


@pytest.mark.parametrize("runner", ["compiled", "eager"])
def test_a_shape_is_the_same_rows_as_flat_ones_to_the_bit(runner):
    shaped, flat = Shaped((2, 3, 5), 7), Flat(30, 7)
    flat.load_state_dict(shaped.state_dict())
    x = torch.randn(5, 3, 2, 3, 5, dtype=DTYPE)
    with fc.runner(runner), torch.no_grad():
        y, (m, h) = fc.Recurrent(shaped)(x, lengths=[5, 2, 0])
        flat_y, (flat_m, flat_h) = fc.Recurrent(flat)(x.flatten(2), lengths=[5, 2, 0])
    assert torch.equal(y.flatten(2), flat_y)
    assert torch.equal(m.flatten(1), flat_m)
    assert torch.equal(h, flat_h)


def test_outputs_of_a_shape_are_no_views_and_share_no_memory():
    layer = fc.Recurrent(Shaped((2, 3), 4, "dict"))
    y, (m, h) = layer(torch.randn(4, 3, 2, 3, dtype=DTYPE))
    memory = [value.untyped_storage().data_ptr() for value in (*y.values(), m, h)]
    assert list(y) == ["a", "h", "first"]
    assert len(set(memory)) == len(memory)
    single, _ = fc.Recurrent(Shaped((2, 3), 4))(torch.randn(4, 3, 2, 3, dtype=DTYPE))
    single.detach_()


def test_a_shape_has_second_gradients():
    layer, x = fc.Recurrent(Shaped((2, 3), 4, "tuple")), torch.randn(3, 2, 2, 3, dtype=DTYPE, requires_grad=True)
    second = []
    for runner in ("compiled", "eager"):
        with fc.runner(runner):
            outputs, _ = layer(x)
            (grad,) = torch.autograd.grad(sum((value**2).sum() for value in outputs), x, create_graph=True)
            second.append(torch.autograd.grad((grad**2).sum(), x)[0])
    torch.testing.assert_close(*second, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
@pytest.mark.parametrize("runner", ["auto", "eager"])
def test_check_cell_takes_shapes(form, runner):
    with fc.runner(runner):
        fc.testing.check_cell(Shaped((2, 3), 4, form))


@pytest.mark.parametrize(("size", "shape"), [((), (5, 3)), (4, (5, 3, 4)), ((2, 2), (5, 3, 2, 2))])
def test_token_ids_stay_integers_in_a_step(size, shape):
    class Grid(Tokens):
        def step(self, x, state):
            assert x.dtype == torch.int64
            return super().step(x.flatten(1) if x.dim() == 3 else x, state)

    layer, ids, state = fc.Recurrent(Grid(size)), torch.randint(0, 11, shape), torch.randn(3, 6, dtype=DTYPE)
    calls = []
    for runner in ("compiled", "eager"):
        with fc.runner(runner):
            calls.append(results(layer, ids, (state.requires_grad_(),)))
    assert_close(*calls)


def test_token_ids_that_a_kernel_cannot_have_exactly_are_refused():
    class Scaled(Tokens):
        def step(self, x, state):
            h = torch.tanh(x.float()[:, None] * 1e-8 + self.rec(state[0]))
            return h, (h,)

    layer = fc.Recurrent(Scaled((), dtype=torch.float32))
    layer(torch.full((2, 3), 2**24))
    large = torch.full((2, 3), 2**24 + 1)
    with fc.runner("compiled"), pytest.raises(fc.NotCompilable, match=r"16,777,217.*all of them up to 16,777,216"):
        layer(large)
    with pytest.warns(fc.EagerWarning, match="16,777,216"):
        y, _ = layer(large)
    with fc.runner("eager"):
        assert torch.equal(y, layer(large)[0])


def test_extra_inputs_have_any_rank():
    class Attends(fc.Cell):
        inputs = ("x", "bias", "ids")

        def step(self, x, state):
            x, bias, ids = x
            h = torch.tanh(x + bias[:, 0, 1] + state[0] + ids[:, :1])
            return h, (h,)

    layer = fc.Recurrent(Attends(4, 4))
    x, bias, ids = torch.randn(5, 3, 4), torch.randn(1, 3, 2, 2, 4), torch.randint(0, 9, (5, 3, 2))
    calls = []
    for runner in ("compiled", "eager"):
        with fc.runner(runner):
            calls.append(layer((x, bias, ids))[0])
    torch.testing.assert_close(*calls)
    dtypes = (torch.float32, torch.float32, torch.int64)
    assert fc.explain(layer, input_sizes=(4, (2, 2, 4), 2), input_dtypes=dtypes).runner == "compiled"


def test_a_step_without_a_sequence_takes_shapes():
    cell, x = Shaped((2, 3), 4), torch.randn(5, 2, 3, dtype=DTYPE)
    output, (m, h) = fc.step(cell, x)
    alone, (row_m, row_h) = fc.step(cell, x[1])
    for value, row in ((output, alone), (m, row_m), (h, row_h)):
        assert torch.equal(value[1], row)
    assert torch.equal(cell(x)[0], m)


def test_packed_sequences_and_unbatched_ones_take_shapes():
    layer, x = fc.Recurrent(Shaped((2, 3), 4, "dict")), torch.randn(5, 3, 2, 3, dtype=DTYPE)
    whole, _ = layer(x, lengths=[2, 5, 3])
    pack = nn.utils.rnn.pack_padded_sequence(x, [2, 5, 3], enforce_sorted=False)
    for name, value in layer(pack)[0].items():
        assert torch.equal(nn.utils.rnn.pad_packed_sequence(value)[0], whole[name])
    for name, value in layer(x[:, 1])[0].items():
        assert torch.equal(value, whole[name][:, 1])


def test_stacks_pairs_and_wrappers_take_shapes():
    torch.manual_seed(0)
    x = torch.randn(5, 3, 2, 3, dtype=DTYPE)
    bottom, top = Shaped((2, 3), 4), Shaped((2, 3), 4)
    stacked, _ = fc.Recurrent(fc.Stack(bottom, top))(x)
    assert torch.equal(stacked, fc.Recurrent(top)(fc.Recurrent(bottom)(x)[0])[0])
    both = fc.Bidirectional(fc.Recurrent(bottom), fc.Recurrent(top))
    y, _ = both(x)
    assert both.output_size == (4, 3)
    assert torch.equal(y[:, :, :2], fc.Recurrent(bottom)(x)[0])
    learned = fc.LearnedState(Shaped((2, 3), 4))
    nn.init.normal_(learned.initial_m)
    before = fc.Recurrent(learned.cell)(x, (learned.initial_m.expand(3, 2, 3), learned.initial_h.expand(3, 4)))
    assert torch.equal(fc.Recurrent(learned)(x)[0], before[0])
    y, (m, _) = fc.Recurrent(fc.VariationalDropout(fc.Zoneout(Shaped((2, 3), 4), 0.3), input=0.5))(x)
    assert (y.shape, m.shape) == ((5, 3, 2, 3), (3, 2, 3))


def test_streams_have_the_users_shapes(tmp_path):
    layer, x = fc.Recurrent(fc.Stack(Shaped((2, 3), 4), Shaped((2, 3), 5))), torch.randn(5, 3, 2, 3, dtype=DTYPE)
    with torch.no_grad():
        expected, state = layer(x)
    stream = fc.Stream(layer, 3)
    assert (stream.input_size, stream.output_size) == ((2, 3), (2, 3))
    assert np.array_equal(np.stack([stream.step(row) for row in x]), expected)
    stream.save(tmp_path / "shaped.fusecell")
    loaded = fc.load_stream(tmp_path / "shaped.fusecell", 3)
    assert np.array_equal(loaded.push(x), expected)
    for one, other, value in zip(loaded.state, stream.state, state, strict=True):
        assert one.shape == value.shape
        assert np.array_equal(one, other)
    loaded.state = [value.numpy() * 0 for value in state]
    assert np.array_equal(loaded.push(x), expected)
    assert fc.load_stream(tmp_path / "shaped.fusecell").push(x[:, 1]).shape == (5, 2, 3)
    with pytest.raises(ValueError, match=r"expected an array of shape \(3, 2, 3\), got \(3, 6\)"):
        loaded.step(x[0].flatten(1))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([], "expected an object of input, output and states"),
        ({"input": [2, 3], "output": [2, 3], "states": []}, "expected 2"),
        ({"input": [2, 4], "output": [2, 3], "states": [[2, 3], [4]]}, "expected dimensions of 6 features"),
        ({"input": [-2, -3], "output": [2, 3], "states": [[2, 3], [4]]}, "expected dimensions of 6 features"),
        ({"input": [2, 3], "output": 6, "states": [[2, 3], [4]]}, "expected dimensions of 6 features"),
        ({"input": [2, 3], "output": [6, True], "states": [[2, 3], [4]]}, "expected dimensions of 6 features"),
        ({"input": [2, 3], "output": [2, 3], "states": [[2, 3], [1] * 17]}, "expected dimensions of 4 features"),
    ],
)
def test_a_file_with_shapes_that_do_not_fit_its_graph_is_refused(shapes, message, tmp_path):
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "shaped.fusecell"
    fc.Stream(fc.Recurrent(SHAPED)).save(path)
    about, tensors = read_tensor_file(path, ("F32", "F64")).metadata, load_file(path)
    parts = json.loads(about["parts"])
    parts[0]["shapes"] = shapes
    text = json.dumps(parts)
    save_file(tensors, path, {**about, "parts": text, "sha256": digest(text, tensors)})
    with pytest.raises(StreamFileError, match=message):
        fc.load_stream(path)


@pytest.mark.parametrize("form", ["tensor", "dict"])
def test_tapes_have_the_users_shapes(form, tmp_path):
    layer, x = fc.Recurrent(Shaped((2, 3), 4, form)), torch.randn(5, 3, 2, 3, dtype=DTYPE)
    resets = torch.rand(5, 3) < 0.3
    tapes = []
    for runner in ("compiled", "eager"):
        with fc.runner(runner):
            tapes.append(fc.record(layer, x, lengths=[5, 2, 3], resets=resets, gradients=True))
        outputs = tapes[-1].outputs
        (outputs["a"] if form == "dict" else outputs).sum().backward()
    first, second = tapes
    names = ("output",) if form == "tensor" else ("output.a", "output.h", "output.first")
    assert first.names() == second.names() == ("m", "h", *names)
    for name in ("m", "h", names[0]):
        torch.testing.assert_close(first.value(name), second.value(name), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(first.gradient(name), second.gradient(name), rtol=1e-11, atol=1e-11)
    assert first.value("m").shape == (5, 3, 2, 3)
    assert first.norms("m").shape == (5, 3)
    assert len(first.frame("m")) == 6 * 10
    first.save(tmp_path / "tape")
    assert torch.equal(fc.Tape.load(tmp_path / "tape").value("m"), first.value("m"))
    first.save_html(tmp_path / "tape.html")


def test_a_summary_has_the_users_shapes():
    line = fc.summary(fc.Recurrent(Shaped((2, 3), 4)), 5, batch_size=3).layers[0]
    assert line.output == (5, 3, 2, 3)
    assert line.states == {"m": (3, 2, 3), "h": (3, 4)}
    assert line.saved


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_torch_export_has_one_operator_for_a_shape(form):
    layer, x = fc.Recurrent(Shaped((2, 3), 4, form)), torch.randn(5, 3, 2, 3, dtype=DTYPE)
    program = torch.export.export(layer, (x,))
    assert sum("fusecell.scan" in str(node.target) for node in program.graph.nodes) == 1
    actual, expected = (torch.utils._pytree.tree_leaves(each(x)) for each in (program.module(), layer))
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_wrong_ranks_say_what_was_expected():
    layer = fc.Recurrent(Shaped((2, 3), 4))
    with pytest.raises(ValueError, match=r"of shape \(T, N, 2, 3\) or \(T, 2, 3\), got \(3, 6\)"):
        layer(torch.zeros(3, 6, dtype=DTYPE))
    with pytest.raises(ValueError, match=r"last dimensions are \(2, 3\).*got a shape of \(5, 3, 3, 2\)"):
        layer(torch.zeros(5, 3, 3, 2, dtype=DTYPE))
    x = torch.zeros(5, 3, 2, 3, dtype=DTYPE)
    with pytest.raises(ValueError, match=r"state m of shape \(3, 2, 3\), got \(3, 6\)"):
        layer(x, (torch.zeros(3, 6, dtype=DTYPE), torch.zeros(3, 4, dtype=DTYPE)))
    with pytest.raises(ValueError, match=r"\(N, 2, 3\) or \(2, 3\) for one step"):
        layer.cell(x)
    with pytest.raises(ValueError, match="Bidirectional concatenates"):
        fc.Bidirectional(fc.Recurrent(Shaped((2, 3), 4)), fc.Recurrent(Shaped((2, 2), 4)))
    with pytest.raises(ValueError, match="must agree"):
        fc.Stack(Shaped((2, 3), 4), Shaped((3, 2), 4))
    with pytest.raises(TypeError, match=r"Linear above a cell of several outputs"):
        fc.Stream(fc.Sequential(fc.Recurrent(Shaped((2, 3), 4, "dict")), nn.Linear(4, 2)))


@pytest.mark.parametrize("runner", ["auto", "eager"])
def test_another_structure_than_declared_is_refused(runner):
    cell = Shaped((2, 3), 4, "dict")
    cell.output_size = {"a": (2, 3), "other": 4}
    x = torch.zeros(5, 3, 2, 3, dtype=DTYPE)
    warns = pytest.warns(fc.EagerWarning, match="as output_size says") if runner == "auto" else nullcontext()
    with fc.runner(runner), warns, pytest.raises(TypeError, match="a dict of 'a', 'other', as output_size says"):
        fc.Recurrent(cell)(x)
    cell.output_size = {"first": (), "h": 5, "a": (2, 3)}
    warns = pytest.warns(fc.EagerWarning, match="expected") if runner == "auto" else nullcontext()
    with (
        fc.runner(runner),
        warns,
        pytest.raises(ValueError, match=r"output\['h'\] of shape \(3, 4\), expected \(3, 5\)"),
    ):
        fc.Recurrent(cell)(x)


def test_an_empty_sequence_has_empty_outputs_of_the_shape():
    y, _ = fc.Recurrent(Shaped((2, 3), 4, "dict"))(torch.zeros(0, 3, 2, 3, dtype=DTYPE))
    assert [value.shape for value in y.values()] == [(0, 3, 2, 3), (0, 3, 4), (0, 3)]


@given(sizes=st.lists(DIMS, min_size=1, max_size=4), keys=st.booleans())
def test_packing_and_unpacking_are_inverse(sizes, keys):
    size = {str(place): shape for place, shape in enumerate(sizes)} if keys else tuple(sizes)
    assert not is_size(size)
    assert list(output_shapes(size).values()) == [feature_shape(shape) for shape in sizes]
    values = [torch.randn(2, 3, *shape) for shape in sizes]
    outputs = dict(zip(size, values, strict=True)) if keys else tuple(values)
    again = unpacked(size, packed(outputs, 2), 2)
    for one, other in zip(again.values() if keys else again, values, strict=True):
        assert torch.equal(one, other)
