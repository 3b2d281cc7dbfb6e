"""``wrap``: modules of other libraries' forms as cells, against loops over the modules themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusecell as fc
from fusecell.shapes import feature_shape, tensors_of


class Output(nn.Module):
    """(x, h) -> (output, h)."""

    def __init__(self) -> None:
        super().__init__()
        self.input_size, self.hidden_size = 5, 7
        self.cell, self.head = nn.RNNCell(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.cell(x, h)
        return self.head(h), h


class Pair(nn.Module):
    """(x, (h, c)) -> (output, (h, c))."""

    def __init__(self) -> None:
        super().__init__()
        self.input_size, self.hidden_size = 5, 7
        self.cell = nn.LSTMCell(5, 7)

    def forward(self, x: Tensor, state: Any) -> Any:
        h, c = self.cell(x, state)
        return h * 2, (h, c)


class Leaky(nn.Module):
    """A neuron that keeps its potential in a buffer, and its spikes in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 5)
        self.register_buffer("mem", torch.zeros(0))
        self.beta = nn.Parameter(torch.tensor(0.9))
        self.spikes: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        mem = self.mem if self.mem.numel() else torch.zeros(len(x), 5)
        self.mem = self.beta * mem + self.lin(x) - self.spikes * 0.5
        self.spikes = torch.sigmoid(5 * (self.mem - 0.2))
        return self.spikes


@pytest.mark.parametrize("make", [lambda: nn.GRUCell(5, 7), lambda: nn.LSTMCell(5, 7), Output, Pair])
def test_state_that_is_passed(make: Any) -> None:
    torch.manual_seed(0)
    module = make()
    cell = fc.wrap(module)
    count = len(cell.states)
    x = torch.randn(4, 3, 5)
    state = tuple(torch.randn(3, 7) for _ in range(count))
    assert fc.explain(cell).training_runner == "compiled"
    output, after = fc.Recurrent(cell)(x, state if count > 1 else state[0])
    expected, now = [], state[0] if count == 1 else state
    for value in x:
        result = module(value, now)
        if isinstance(result, Tensor):
            expected, now = [*expected, result], result
        elif make in (Output, Pair):
            expected, now = [*expected, result[0]], result[1]
        else:
            expected, now = [*expected, result[0]], result
    torch.testing.assert_close(output, torch.stack(expected))
    torch.testing.assert_close(after, now)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_state_in_attributes() -> None:
    torch.manual_seed(0)
    module, x = Leaky(), torch.randn(6, 3, 5)
    cell = fc.wrap(module, input_size=5, states=("mem", "spikes"))
    assert (cell.states, cell.state_sizes) == (("mem", "spikes"), (5, 5))
    assert fc.explain(cell).training_runner == "compiled"
    output, (mem, spikes) = fc.Recurrent(cell)(x)
    assert module.mem.numel() == 0
    assert module.spikes == 0.0
    expected = torch.stack([module(value) for value in x])
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close((mem, spikes), (module.mem, module.spikes))


def test_state_of_submodules() -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(Leaky(), nn.Linear(5, 5), Leaky()), torch.randn(6, 3, 5)
    cell = fc.wrap(module, input_size=5, states=("0.mem", "0.spikes", "2.mem", "2.spikes"))
    assert cell.states == ("state_0_mem", "state_0_spikes", "state_2_mem", "state_2_spikes")
    output, _ = fc.Recurrent(cell)(x)
    torch.testing.assert_close(output, torch.stack([module(value) for value in x]))


def test_recurrent_wraps_cells_of_torch() -> None:
    module, x = nn.GRUCell(5, 7), torch.randn(4, 3, 5)
    layer = fc.Recurrent(module)
    assert layer.cell.module is module
    ours = fc.GRUCell(5, 7)
    ours.load_state_dict(module.state_dict())
    torch.testing.assert_close(layer(x)[0], fc.Recurrent(ours)(x)[0])


def test_a_step_that_unpacks_its_states_has_two() -> None:
    """A probe with one state of two rows would be taken apart by ``h, c = state``, and pass for a step."""

    class Unpacks(nn.Module):
        input_size, hidden_size = 5, 7

        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(5, 7)

        def forward(self, x: Tensor, state: Any) -> Any:
            h, c = state
            return self.cell(x, (h.expand(len(x), 7), c.expand(len(x), 7)))

    module, x = Unpacks(), torch.randn(4, 3, 5)
    cell = fc.wrap(module)
    assert cell.states == ("h", "c")
    state = (torch.randn(3, 7), torch.randn(3, 7))
    expected, now = [], state
    for value in x:
        now = module(value, now)
        expected.append(now[0])
    y, after = fc.Recurrent(cell)(x, state)
    torch.testing.assert_close(y, torch.stack(expected))
    torch.testing.assert_close(after, now)


def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"expected an nn\.Module"):
        fc.wrap(torch.tanh)
    with pytest.raises(TypeError, match="fusecell cell already"):
        fc.wrap(fc.GRUCell(3, 4))
    with pytest.raises(ValueError, match="no input_size"):
        fc.wrap(nn.Tanh())
    with pytest.raises(ValueError, match="no hidden_size"):
        fc.wrap(nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"is no step.*with 1 state"):
        fc.wrap(nn.GRU(3, 4))
    with pytest.raises(ValueError, match="after a step nothing"):
        fc.wrap(nn.Linear(3, 4), states=("nothing",))


class Picture(nn.Module):
    """A state that is an image, in the form of ConvLSTM cells."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 12, 3, padding=1)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, c = state
        i, f, o, g = self.conv(torch.cat((x, h), 1)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return h, (h, c)


class Spikes(nn.Module):
    """An image of potentials in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.mem: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.mem = 0.8 * self.mem + self.conv(x)
        return torch.tanh(self.mem)


class Several(nn.Module):
    """Several outputs next to the state, as a dict or as a tuple."""

    input_size, hidden_size = 5, 7

    def __init__(self, is_dict: bool) -> None:
        super().__init__()
        self.cell, self.readout, self.is_dict = nn.GRUCell(5, 7), nn.Linear(7, 6), is_dict

    def forward(self, x: Tensor, h: Tensor) -> tuple[Any, Tensor]:
        h = self.cell(x, h)
        outputs = {"map": self.readout(h).view(-1, 2, 3), "sum": h.sum(1)}
        return (outputs if self.is_dict else tuple(outputs.values())), h


class Ids(nn.Module):
    hidden_size = 7

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cell = nn.Embedding(9, 5), nn.GRUCell(5, 7)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.cell(self.table(x), h)


@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (lambda: fc.wrap(Picture(), input_size=(2, 4, 3), state_sizes=((3, 4, 3),) * 2), (3, 4, 3)),
        (lambda: fc.wrap(Spikes(), input_size=(2, 4, 3), states=("mem",)), (3, 4, 3)),
        (lambda: fc.wrap(Several(True)), {"map": (2, 3), "sum": ()}),
        (lambda: fc.wrap(Several(False)), ((2, 3), ())),
        (lambda: fc.wrap(Ids(), input_size=()), 7),
    ],
)
def test_shapes_ids_and_several_outputs(make: Any, sizes: Any) -> None:
    torch.manual_seed(0)
    cell, results = make().double(), []
    assert cell.output_size == sizes
    x = torch.randint(0, 9, (4, 3)) if cell.input_size == () else torch.randn(4, 3, *feature_shape(cell.input_size))
    x = x if cell.input_size == () else x.double()
    for runner in ("compiled", "eager"):
        with fc.runner(runner):
            y, _ = fc.scan(cell, x, lengths=[4, 2, 3])
            gradients = torch.autograd.grad(sum(v.sin().sum() for v in tensors_of(y)), list(cell.parameters()))
        results.append((*tensors_of(y), *gradients))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


class Takes(nn.Module):
    """A step whose states are passed in a form that wrap doesn't pass them in."""

    def __init__(self, form):
        super().__init__()
        self.form, self.cell = form, nn.LSTMCell(5, 6)

    def forward(self, x, *args, **kwargs):
        h, c = self.form(*args, **kwargs)
        h, c = self.cell(x, (h, c))
        return h, (h, c)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (lambda h, c: (h, c), "missing 1 required positional argument: 'c'"),
        (lambda state: (state["h"], state["c"]), "tuple indices must be integers"),
        (lambda *, state: state, "takes 0 positional arguments but 1"),
    ],
    ids=["apart", "dict", "keyword"],
)
def test_a_form_of_states_that_is_not_passed_is_told(form, reason):
    with pytest.raises(
        ValueError, match=rf"Takes is no step: .*states of 6, 6 features it raises TypeError: .*{reason}"
    ):
        fc.wrap(Takes(form), input_size=5, state_sizes=(6, 6))


class Uncopied(nn.Module):
    """A module that can't be copied, and that evaluation mode and a step change."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.mem: object = 0.0

    def __deepcopy__(self, memo: object) -> Uncopied:
        raise AttributeError("no copy")

    def forward(self, x: Tensor) -> Tensor:
        self.mem = self.norm(self.map(x)) + self.mem
        return torch.relu(self.mem)


def test_a_module_that_cannot_be_copied_is_wrapped_and_left_as_it_was() -> None:
    module = Uncopied()
    cell = fc.wrap(module, input_size=4, states=("mem",))
    assert (cell.state_sizes, cell.output_size, module.mem) == ((4,), 4, 0.0)
    assert all(part.training for part in module.modules())
    assert module.norm.num_batches_tracked == 0
