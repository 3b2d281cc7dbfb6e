"""check_cell: a broken cell for every check, each failing with its sentence, and a healthy one passing."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from torch import nn

import fusecell as fc
from fusecell.testing import CHECKS, CellCheckError, check_cell

pytestmark = pytest.mark.usefixtures("eager")


class Healthy(fc.Cell):
    """A plain cell that the broken ones below differ from in one thing each."""

    def __init__(self, input_size: int = 3, hidden_size: int = 4):
        super().__init__(input_size, hidden_size)
        self.inp = nn.Linear(input_size, hidden_size)
        self.rec = nn.Linear(hidden_size, hidden_size)

    def step(self, x, state):
        (h,) = state
        h = torch.tanh(self.inp(x) + self.rec(h))
        return h, (h,)


class WideOutput(Healthy):
    def step(self, x, state):
        h, state = super().step(x, state)
        return torch.cat((h, h), -1), state


class BareState(Healthy):
    def step(self, x, state):
        h, _ = super().step(x, state)
        return h, h


class TwoStatesForOne(Healthy):
    def step(self, x, state):
        h, _ = super().step(x, state)
        return h, (h, h)


class SizesForNoState(Healthy):
    state_sizes = (4, 4)


class SingleConstant(Healthy):
    def step(self, x, state):
        h, _ = super().step(x, state)
        h = torch.where(h > 0, h, torch.zeros(4)).float()
        return h, (h,)


class WrongInitialState(Healthy):
    def initial_state(self, batch_size, *, dtype=None, device=None):
        return (torch.zeros(4, batch_size, dtype=dtype, device=device),)


class InPlaceOnState(Healthy):
    def step(self, x, state):
        (h,) = state
        h *= 0.5
        return super().step(x, (h,))


class InPlaceOnBuffer(Healthy):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def step(self, x, state):
        self.count += 1
        return super().step(x, state)


class Remembering(Healthy):
    """A cell that keeps a value on the module between calls."""

    before = 0.0

    def step(self, x, state):
        h, _ = super().step(x, state)
        h = h + self.before
        self.before = 0.5 * h.mean(0)
        return h, (h,)


class Random(Healthy):
    def step(self, x, state):
        h, _ = super().step(x, state)
        h = nn.functional.dropout(h, 0.5)
        return h, (h,)


class Branching(Healthy):
    def step(self, x, state):
        (h,) = state
        if h.sum() > 0:
            x = -x
        return super().step(x, (h,))


class Listing(Healthy):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.rand(4))

    def step(self, x, state):
        h, _ = super().step(x, state)
        h = h * h.new_tensor(self.scale.tolist())
        return h, (h,)


class Detached(Healthy):
    def step(self, x, state):
        (h,) = state
        return super().step(x, (h.detach(),))


class _WrongSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        ctx.save_for_backward(weight)
        return weight**2

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return grad * weight  # not 2 * weight


class WrongBackward(Healthy):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(4) + 0.5)

    def step(self, x, state):
        h, _ = super().step(x, state)
        h = h * _WrongSquare.apply(self.gain)
        return h, (h,)


class MixedRows(Healthy):
    def step(self, x, state):
        return super().step(x - x.mean(0), state)


class Squeezed(Healthy):
    def step(self, x, state):
        h, _ = super().step(x, state)
        return h, (h.squeeze(),)


class NotedTwice(Healthy):
    def step(self, x, state):
        h, _ = super().step(x, state)
        return self.note("a", self.note("a", h)), (h,)


class NotedAsState(Healthy):
    def step(self, x, state):
        h, _ = super().step(x, state)
        self.note("h", 2 * h)
        return h, (h,)


class NotedScalar(Healthy):
    def step(self, x, state):
        h, _ = super().step(x, state)
        self.note("mean", h.mean())
        return h, (h,)


class Counting(Healthy):
    """A cell whose step depends on the number of calls."""

    calls = 0

    def step(self, x, state):
        h, _ = super().step(x, state)
        self.calls += 1
        h = h * (1 + 0.1 * (self.calls % 7))
        return h, (h,)


class MovingStart(Healthy):
    """A cell whose initial state differs from call to call."""

    calls = 0

    def initial_state(self, batch_size, *, dtype=None, device=None):
        self.calls += 1
        return (torch.full((batch_size, 4), 0.5 * self.calls, dtype=dtype, device=device),)


class DrawsOneStepLess(Healthy):
    inputs = ("x", "noise")

    def draw(self, steps, batch_size, *, dtype=None, device=None):
        first = torch.zeros(1, batch_size, 4, dtype=dtype, device=device)
        return (torch.cat((first, torch.randn(steps - 1, batch_size, 4, dtype=dtype, device=device))),)

    def step(self, x, state):
        h, _ = super().step(x[0], state)
        h = h + x[1]
        return h, (h,)


class OnlyBatches(Healthy):
    def forward(self, input, hx=None):
        rows, _ = input.shape
        return super().forward(input.reshape(rows, -1), hx)


class OtherRowForward(Healthy):
    def forward(self, input, hx=None):
        return super().forward(input, hx) + (input.dim() == 1)


class ReturnsItsState(Healthy):
    def forward(self, input, hx=None):
        return hx


class Lambda(Healthy):
    def __init__(self):
        super().__init__()
        self.act = lambda h: h


class ForgetsWhenCopied(Healthy):
    gain = 1.0

    def __init__(self):
        super().__init__()
        self.gain = 2.0

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "gain"}

    def step(self, x, state):
        h, _ = super().step(x, state)
        return self.gain * h, (h,)


class NotCopyable(Healthy):
    def __init__(self):
        super().__init__()
        self.twice = 2 * self.rec.weight  # a computed tensor: deepcopy refuses it


class ExtraState(Healthy):
    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        assert state == {"version": 1}


class HiddenParameter(Healthy):
    def state_dict(self, *args, **kwargs):
        saved = super().state_dict(*args, **kwargs)
        del saved["rec.bias"]
        return saved


class OtherValue(Healthy):
    def state_dict(self, *args, **kwargs):
        saved = super().state_dict(*args, **kwargs)
        saved["rec.bias"] = saved["rec.bias"] + 1
        return saved


BROKEN = [
    ("shapes", WideOutput, r"step gives output of shape \(3, 8\), expected \(3, 4\).*self\.output_size"),
    ("shapes", BareState, r"step returns \(Tensor, Tensor\); expected \(output, state\) with state a tuple"),
    ("shapes", TwoStatesForOne, r"step gives 2 states, expected 1 \(h\)"),
    ("shapes", SizesForNoState, r"state_sizes \(4, 4\) has 2 entries for the states \('h',\)"),
    ("shapes", SingleConstant, r"step gives output in torch.float32 after cell.to\(torch.float64\).*new_tensor"),
    ("shapes", WrongInitialState, r"initial_state gives h of shape \(4, 3\), expected \(3, 4\)"),
    ("purity", InPlaceOnState, r"step changes state h in place: it is .* expected .*Compute a new tensor"),
    ("purity", InPlaceOnBuffer, r"step changes buffer count in place: it is \d+ at \[\], expected \d+\. Compute"),
    ("purity", Remembering, r"state h of a second call with the same arguments is .*Keep nothing from call to call"),
    ("purity", Random, r"step uses the global random generator. Draw in draw\(\)"),
    ("module", Remembering, r"step changes the module: it (adds|sets) self.before in test_check_cell.py, line \d+:"),
    ("module", InPlaceOnBuffer, r"step changes the module: it changes self.count in test_check_cell.py, line \d+:"),
    ("branches", Branching, r"step reads a tensor's value into Python \(__bool__\).*torch\.where"),
    ("branches", Listing, r"step reads a tensor's value into Python \(tolist\)"),
    ("gradients", Detached, r"the gradient of state h is not that of the values: .*Look for detach\(\)"),
    ("gradients", WrongBackward, r"the gradient of parameter gain .*A cell with kinks \(relu, abs, clamp\)"),
    ("rows", MixedRows, r"of row 0 alone, against the same row in the batch.*last dimension"),
    ("rows", MixedRows, r"of other rows, when only row 0 is changed,.*must not mix rows"),
    ("rows", Squeezed, r"state h of row 0 alone.* has shape \(4,\), expected \(1, 4\).*never as squeeze"),
    ("notes", NotedTwice, r"note names 'a' twice in a step"),
    ("notes", NotedAsState, r"note uses 'h', which is recorded anyway"),
    ("notes", NotedScalar, r"note names 'mean' a value of shape \(\), expected \(3, size\)"),
    ("sequence", Remembering, r"the output of the sequence, against a loop over step, is .*in the state"),
    ("lengths", Counting, r"with lengths \[5, 1, 0\], against a plain loop, is"),
    ("reverse", Counting, r"reversed within lengths \[5, 1, 0\], against a plain loop, is"),
    ("resets", MovingStart, r"with resets, against a plain loop, is .*initial_state must give the same at every call"),
    ("halves", Remembering, r"of two halves, cut at step 2, against the whole, is"),
    ("empty", DrawsOneStepLess, r"a call raises RuntimeError: .*negative dimension -1"),
    ("unbatched", OnlyBatches, r"a call raises ValueError: not enough values to unpack"),
    ("unbatched", OtherRowForward, r"state h of cell\(x\) without a batch is .* expected .*Leave forward to"),
    ("aliasing", ReturnsItsState, r"state h that cell\(x\) returns shares its memory with state h; writing to one"),
    ("copies", Lambda, r"pickle raises .*keep lambdas"),
    ("copies", ForgetsWhenCopied, r"the output of a copy by pickle is .*__getstate__"),
    ("copies", NotCopyable, r"deepcopy raises RuntimeError: .*computed tensors"),
    ("state_dict", ExtraState, r"state_dict holds '_extra_state', which is neither parameter nor buffer"),
    ("state_dict", HiddenParameter, r"state_dict lacks the parameter 'rec.bias', so saving a model would lose it"),
    ("state_dict", OtherValue, r"'rec.bias' in the state_dict is .*, which is what the cell holds"),
]


def failures(cell: fc.Cell, **options) -> list[tuple[str, str]]:
    with pytest.raises(CellCheckError) as caught:
        check_cell(cell, **options)
    assert isinstance(caught.value, AssertionError)
    return list(caught.value.failures)


@pytest.mark.parametrize(("check", "broken", "sentence"), BROKEN)
def test_a_broken_cell_fails_its_check(check: str, broken: type[fc.Cell], sentence: str):
    sentences = [text for name, text in failures(broken()) if name == check]
    assert any(re.search(sentence, text, re.DOTALL) for text in sentences), sentences


def test_every_check_has_a_broken_cell():
    assert {check for check, _, _ in BROKEN} == set(CHECKS)


ONLY = {
    "gradients": [Detached, WrongBackward],
    "branches": [Listing],
    "notes": [NotedTwice, NotedAsState, NotedScalar],
    "resets": [MovingStart],
    "unbatched": [OtherRowForward],
    "copies": [Lambda, ForgetsWhenCopied],
    "state_dict": [ExtraState],
}


@pytest.mark.parametrize(("check", "broken"), [(check, broken) for check, cells in ONLY.items() for broken in cells])
def test_a_broken_cell_fails_only_its_check(check: str, broken: type[fc.Cell]):
    assert {name for name, _ in failures(broken())} == {check}


def test_all_failures_come_at_once():
    class Both(NotedTwice):
        def state_dict(self, *args, **kwargs):
            return {**super().state_dict(*args, **kwargs), "more": torch.zeros(1)}

    with pytest.raises(CellCheckError) as caught:
        check_cell(Both())
    text = str(caught.value)
    title, first = text.splitlines()[:2]
    assert title == "Both fails 3 checks; mend the first one first, as later ones often follow from it:"
    assert first.startswith("  notes: note names 'a' twice")
    assert "copies: pickle raises" in text  # the class is local
    assert "state_dict: state_dict holds 'more'" in text
    assert "load_state_dict doesn't take 'more'" in text


def test_the_report_lists_the_checks():
    report = check_cell(Healthy())
    assert [name for name, _ in report.checks] == list(CHECKS)
    lines = str(report).splitlines()
    assert lines[0] == "Healthy keeps the contract:"
    assert lines[1].split() == ["shapes", *CHECKS["shapes"].__doc__.split()]
    assert len(lines) == len(CHECKS) + 1


def test_skip_leaves_checks_out():
    report = check_cell(Detached(), skip=("gradients",))
    assert "gradients" not in [name for name, _ in report.checks]
    assert len(report.checks) == len(CHECKS) - 1


def test_arguments_are_checked():
    with pytest.raises(TypeError, match=r"check_cell takes a fusecell.Cell, got Linear. Pass layer.cell for a layer"):
        check_cell(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="at least 2 steps and 2 rows, got steps=1, batch_size=3"):
        check_cell(Healthy(), steps=1)
    with pytest.raises(ValueError, match=r"There are no checks \['speed'\]; there are shapes, purity"):
        check_cell(Healthy(), skip=("speed",))


class Modulated(Healthy):
    inputs = ("x", "gain", "index")

    def step(self, x, state):
        x, gain, index = x
        h, _ = super().step(x, state)
        h = h * gain + index
        return h, (h,)


def test_extras():
    extras = (torch.rand(5, 3, 4), torch.arange(3).reshape(1, 3, 1))
    check_cell(Modulated(), extras=extras)
    with pytest.raises(ValueError, match=r"\(x, gain, index\) and draws 0 of them; pass the 2 between as extras"):
        check_cell(Modulated())


def test_the_cell_and_the_generator_are_left_as_they_were():
    cell = Healthy().eval()
    before = copy.deepcopy(cell.state_dict())
    generator = torch.get_rng_state()
    check_cell(cell)
    assert not cell.training
    assert all(p.grad is None and p.dtype == torch.float32 for p in cell.parameters())
    assert all(torch.equal(value, before[name]) for name, value in cell.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())


@pytest.mark.parametrize(("steps", "batch_size", "seed"), [(2, 2, 0), (7, 5, 11)])
def test_stacks_are_cells_too(steps: int, batch_size: int, seed: int):
    stack = fc.Stack(fc.GRUCell(3, 5), fc.Stack(fc.LSTMCell(5, 5), fc.cells.MGUCell(5, 5), residual=True))
    check_cell(stack, steps=steps, batch_size=batch_size, seed=seed)


def test_a_stack_with_dropout_is_checked_in_eval():
    stack = fc.Stack(fc.GRUCell(3, 4), fc.GRUCell(4, 2), dropout=0.5)
    check_cell(stack.eval())
    assert any("check a Stack in eval()" in text for _, text in failures(stack.train()))


class Shift(fc.Cell):
    """A shift register: a state that becomes another state, nothing computed."""

    states = ("new", "old")

    def step(self, x, state):
        new, old = state
        return old, (x, new)


def test_a_cell_without_parameters():
    check_cell(Shift(3, 3))


class NotedNewState(Healthy):
    def step(self, x, state):
        h, _ = super().step(x, state)
        h = self.note("h", h)
        return h, (h,)


def test_a_state_may_be_noted_where_it_is_new():
    check_cell(NotedNewState(3, 4))


def test_failures_are_reported_without_torch_warnings():
    """torch warns once per process when a number is read from a tensor that requires grad."""
    cell = MixedRows()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problems = failures(cell)
    assert {name for name, _ in problems} >= {"rows"}
    assert not [text for _, text in problems if "UserWarning" in text]


@pytest.mark.parametrize("kind", [fc.cells.LIFCell, fc.cells.ALIFCell])
def test_surrogate_gradients_are_compared_with_the_loops(kind):
    cell = kind(3, 4)
    with pytest.raises(CellCheckError, match="surrogate=True"):
        check_cell(cell)
    report = check_cell(cell, surrogate=True)
    assert (
        "gradients",
        "gradients of a sequence are those of the loop over step, surrogates included",
    ) in report.checks


def test_a_backward_that_counts_its_calls_is_no_surrogate():
    calls = []

    class Counting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            calls.append(1)
            return grad * len(calls)

    class Counted(fc.Cell):
        def step(self, x, state):
            h = torch.tanh(Counting.apply(x) + state[0])
            return h, (h,)

    with pytest.raises(CellCheckError, match="differs from that of a loop over step"):
        check_cell(Counted(3, 3), surrogate=True, skip=("module", "purity"))
