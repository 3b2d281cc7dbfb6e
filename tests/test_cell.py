"""The contract of cells (inputs, dtypes, errors) and of the package, on the reference runner."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor, nn

import fusecell as fc
from fusecell.cell import capture_intermediates
from fusecell.execution.context import active_runner
from tests.reference import close

pytestmark = pytest.mark.usefixtures("eager")


class Gain(fc.Cell):
    """Takes a second input, which may be constant over time."""

    inputs = ("x", "gain")

    def __init__(self, input_size: int = 3, hidden_size: int = 4):
        super().__init__(input_size, hidden_size)
        self.lin = nn.Linear(input_size + hidden_size, hidden_size)

    def step(self, x, state):
        x, gain = x
        h = torch.tanh(self.lin(torch.cat((x, state[0]), -1))) * gain
        return h, (h,)


class Noisy(Gain):
    """Draws its second input itself."""

    inputs = ("x", "noise")

    def draw(self, steps, batch_size, *, dtype=None, device=None):
        return (torch.randn(steps, batch_size, self.hidden_size, dtype=dtype, device=device),)


class Stateless(fc.Cell):
    states = ()

    def step(self, x, state):
        return 2 * x, ()


class Token(fc.Cell):
    """A cell whose input is integers."""

    def __init__(self, hidden_size: int = 4):
        super().__init__(1, hidden_size)
        self.table = nn.Embedding(9, hidden_size)
        self.lin = nn.Linear(hidden_size, hidden_size)

    def step(self, x, state):
        h = torch.tanh(self.table(x[:, 0]) + self.lin(state[0]))
        return h, (h,)


# Cells


def test_a_cell_without_step_says_how_to_write_one():
    with pytest.raises(NotImplementedError, match=r"Cell has no step. Write step\(self, x, state\)"):
        fc.Cell(3, 4)(torch.randn(2, 3))


def test_sizes_default_and_can_be_overridden_both_ways():
    class ByProperty(fc.Cell):
        states = ("a", "b")

        @property
        def state_sizes(self):
            return (self.hidden_size, 2)

        @property
        def output_size(self):
            return 7

    class ByAssignment(fc.Cell):
        def __init__(self):
            super().__init__(3, 4)
            self.state_sizes = (5,)
            self.output_size = 6

    assert (fc.Cell(3, 4).state_sizes, fc.Cell(3, 4).output_size) == ((4,), 4)
    assert (ByProperty(3, 4).state_sizes, ByProperty(3, 4).output_size) == ((4, 2), 7)
    assert (ByAssignment().state_sizes, ByAssignment().output_size) == ((5,), 6)
    start = ByProperty(3, 4).initial_state(2, dtype=torch.float64)
    assert [(value.shape, value.dtype) for value in start] == [((2, 4), torch.float64), ((2, 2), torch.float64)]
    assert all((value == 0).all() for value in start)


def test_forward_returns_the_state_and_step_the_output_too():
    cell = fc.cells.SCRNCell(3, 4, 2, dtype=torch.float64)
    x, h, s = torch.randn(2, 3).double(), torch.randn(2, 4).double(), torch.randn(2, 2).double()
    output, state = cell.step(x, (h, s))
    close(cell(x, (h, s)), state)
    close(fc.step(cell, x, (h, s)), (output, state))
    one = fc.cells.MGUCell(3, 4, dtype=torch.float64)
    assert isinstance(one(x), Tensor)
    close(one(x), one.step(x, (torch.zeros(2, 4).double(),))[0])


def test_one_step_without_a_batch():
    cell = fc.cells.PeepholeLSTMCell(3, 4)
    x, h, c = torch.randn(3), torch.randn(4), torch.randn(4)
    output, state = fc.step(cell, x, (h, c))
    batched, states = fc.step(cell, x[None], (h[None], c[None]))
    assert torch.equal(output, batched[0])
    assert all(torch.equal(a, b[0]) for a, b in zip(state, states, strict=True))
    assert [value.shape for value in cell(x)] == [(4,), (4,)]


def test_whole_numbers_go_in_and_states_keep_the_weights_dtype():
    cell = Token().double()
    tokens = torch.randint(9, (5, 2, 1))
    y, h = fc.scan(cell, tokens)
    assert (y.dtype, h.dtype) == (torch.float64, torch.float64)
    state = None
    for t in range(5):
        output, state = fc.step(cell, tokens[t], state)
        close(output, y[t])


def test_cells_without_state_run_too():
    x = torch.randn(4, 2, 3)
    y, state = fc.scan(Stateless(3, 3), x, lengths=[4, 1], resets=torch.ones(4, 2, dtype=torch.bool))
    assert state == ()
    assert torch.equal(y[:, 0], 2 * x[:, 0])
    assert torch.equal(y[1:, 1], torch.zeros(3, 3))


def test_note_names_values_only_inside_noting():
    cell, seen = fc.cells.MGUCell(3, 4), []
    x, h = torch.randn(2, 3), torch.randn(2, 4)
    assert cell.note("f", x) is x
    with capture_intermediates(lambda owner, name, value: seen.append((owner, name, value.shape))):
        cell(x, h)
    cell(x, h)
    assert seen == [(cell, "f", (2, 4)), (cell, "n", (2, 4))]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda h: h, r"step must return \(output, state\) with state a tuple, got Tensor"),
        (lambda h: (h, h), r"step must return \(output, state\) with state a tuple, got \(Tensor, Tensor\)"),
        (lambda h: (h, (h, h)), r"step returned 2 states, expected 1 \(h\)"),
        (lambda h: (h[:, :2], (h,)), r"an output of shape \(2, 2\), expected \(2, 4\).*set self.output_size"),
        (lambda h: (h, (h[:, :2],)), r"state h of shape \(2, 2\), expected \(2, 4\).*set self.state_sizes"),
        (lambda h: (h, (1.0,)), r"step returned float as state h, expected a tensor of shape \(2, 4\)"),
        (lambda h: (h, (h.double(),)), r"turned state h from torch.float32 into torch.float64"),
    ],
)
def test_a_step_that_returns_something_else_gets_a_sentence(change, sentence: str):
    class Odd(fc.cells.MGUCell):
        def step(self, x, state):
            return change(super().step(x, state)[0])

    with pytest.raises((TypeError, ValueError), match=sentence):
        fc.scan(Odd(3, 4), torch.randn(5, 2, 3))


# Extras


def test_inputs_beside_x_may_be_constant_over_time():
    cell = Gain().double()
    x, gain = torch.randn(5, 2, 3).double(), torch.rand(1, 2, 4).double()
    y, h = fc.scan(cell, (x, gain))
    close((y, h), fc.scan(cell, (x, gain.expand(5, 2, 4))))
    close(fc.scan(cell, (x[:1], gain.expand(5, 2, 4)))[0], fc.scan(cell, (x[:1].expand(5, 2, 3), gain))[0])
    close(fc.Recurrent(cell, batch_first=True)((x.transpose(0, 1), gain.transpose(0, 1)))[0].transpose(0, 1), y)
    close(fc.scan(cell, (x[:, 1], gain[:, 1]))[0], y[:, 1])
    state = None
    for t in range(5):
        output, state = fc.step(cell, (x[t], gain[0]), state)
        close(output, y[t])


def test_draw_is_called_once_per_call_and_appended():
    cell = Noisy()
    x, h = torch.randn(5, 2, 3), torch.zeros(2, 4)
    torch.manual_seed(7)
    y, _ = fc.scan(cell, x)
    torch.manual_seed(7)
    noise = torch.randn(5, 2, 4)
    for t in range(5):
        h, _ = cell.step((x[t], noise[t]), (h,))
        torch.testing.assert_close(y[t], h)


def test_draws_of_a_stack_go_to_their_cells():
    stack = fc.Stack(Noisy(3, 4), fc.Stack(fc.GRUCell(4, 4), Noisy(4, 5)), Noisy(5, 2))
    assert stack.inputs == ("x", "noise", "noise11", "noise2")
    x = torch.randn(1, 2, 3)
    torch.manual_seed(7)
    y, after = fc.scan(stack, x)
    torch.manual_seed(7)
    output, state = fc.step(stack, x[0])
    torch.testing.assert_close((y[0], after), (output, state))


def test_inputs_are_counted():
    x, gain = torch.randn(5, 2, 3), torch.rand(5, 2, 4)
    for run, value in ((fc.scan, (x,)), (fc.step, (x[0],))):
        with pytest.raises(ValueError, match=r"Gain takes the inputs \(x, gain\) and draws 0 .* given 2, got 1"):
            run(Gain(), value)
    with pytest.raises(ValueError, match=r"GRUCell takes the inputs \(x\) and draws 0 .* given 1, got 2"):
        fc.scan(fc.GRUCell(3, 4), (x, gain))
    above = fc.Stack(fc.GRUCell(3, 3), Gain(3, 4))
    for run, value in ((fc.scan, x), (fc.step, x[0])):
        with pytest.raises(ValueError, match="in a Stack only the bottom cell is given any"):
            run(above, value)
    y, _ = fc.scan(fc.Stack(Gain(3, 4), fc.GRUCell(4, 2)), (x, gain))
    assert y.shape == (5, 2, 2)


# Dtypes and devices


def test_autocast_is_switched_off_round_the_loop():
    cell = fc.cells.MGUCell(3, 4)
    x, h = torch.randn(5, 2, 3).bfloat16(), torch.randn(2, 4).bfloat16()
    expected, last = fc.scan(cell, x.float(), h.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, h_n = fc.scan(cell, x, h)
        output, _ = fc.step(cell, x[0], h)
    assert y.dtype == torch.float32
    torch.testing.assert_close((y, h_n), (expected, last))
    torch.testing.assert_close(output, expected[0])


def test_dtypes_that_differ_from_the_weights_are_refused():
    cell = fc.cells.MGUCell(3, 4)
    x = torch.randn(5, 2, 3)
    with pytest.raises(ValueError, match=r"torch.float32 and input x is torch.float64.*\.to\(torch.float32"):
        fc.scan(cell, x.double())
    with pytest.raises(ValueError, match=r"weights are torch.float32 and input x is torch.float64"):
        fc.step(cell, x[0].double())
    with pytest.raises(ValueError, match=r"weights are torch.float32 and state h is torch.float64"):
        fc.scan(cell, x, torch.zeros(2, 4).double())


def test_meta_tensors_and_vmap():
    y, h = fc.scan(fc.GRUCell(3, 4, device="meta"), torch.randn(5, 2, 3, device="meta"))
    assert (y.shape, h.shape, y.device.type) == ((5, 2, 4), (2, 4), "meta")
    cell, x = fc.cells.MGUCell(3, 4), torch.randn(6, 5, 2, 3)
    y = torch.func.vmap(lambda x: fc.scan(cell, x)[0])(x)
    torch.testing.assert_close(y, torch.stack([fc.scan(cell, row)[0] for row in x]))


# Errors


X = torch.zeros(5, 2, 3)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda c: fc.scan(c, X[..., :2]), ValueError, r"expected 3 input features, got 2 in an input of shape"),
        (lambda c: fc.scan(c, X[None]), ValueError, r"sequence of shape \(T, N, 3\) or \(T, 3\), got \(1, 5, 2, 3\)"),
        (lambda c: fc.scan(c, X.numpy()), TypeError, r"takes tensors for its inputs \(x\), got \(ndarray"),
        (lambda c: fc.scan(nn.GRUCell(3, 4), X), TypeError, r"got torch.nn.GRUCell. Use fusecell.GRUCell"),
        (lambda c: fc.Recurrent(nn.Linear(3, 4)), TypeError, r"got Linear. Subclass fusecell.Cell and write step"),
        (lambda c: fc.scan(c, X, (X[0], X[0])), ValueError, r"has 1 states \(h\), got 2"),
        (lambda c: fc.scan(c, X, torch.zeros(1, 4)), ValueError, r"state h of shape \(2, 4\), got \(1, 4\)"),
        (lambda c: fc.scan(c, X, ("h",)), TypeError, r"takes a state of tensors \(h\), got \(str\)"),
        (lambda c: fc.scan(c, X, 5), TypeError, r"takes a state of tensors \(h\), got \(int\)"),
        (lambda c: fc.scan(c, X, lengths=[5.0, 2.0]), TypeError, r"lengths must be integers, got torch.float"),
        (lambda c: fc.scan(c, X, lengths=[5]), ValueError, r"one entry per row, shape \(2,\), got \(1,\)"),
        (lambda c: fc.scan(c, X, lengths=[6, 1]), ValueError, r"between 0 and the 5 steps of the input, got 1 to 6"),
        (lambda c: fc.scan(c, X, lengths=[-1, 1]), ValueError, r"got -1 to 1"),
        (lambda c: fc.scan(c, X, resets=X[..., 0]), TypeError, r"resets must be bool.*Pass resets.bool\(\)"),
        (lambda c: fc.scan(c, X, resets=X[1:, :, 0] > 0), ValueError, r"resets must have shape \(5, 2\).*got \(4, 2\)"),
        (lambda c: fc.scan(Gain(), (X, X[0, 0, 0])), ValueError, r"input gain with a time and a batch dimension"),
        (lambda c: fc.scan(Gain(), (X, X[:, :1])), ValueError, r"input gain with 2 rows, as x has"),
        (lambda c: fc.scan(Gain(), (X, X[:3])), ValueError, r"inputs \(x, gain\) have \(5, 3\) steps; they must agree"),
        (lambda c: fc.step(c, X), ValueError, r"for one step, got \(5, 2, 3\). For a whole sequence use fusecell.Rec"),
        (lambda c: fc.step(c, X[0, :, :2]), ValueError, r"expected 3 input features, got 2"),
        (lambda c: fc.step(Gain(), (X[0], X[0, :1])), ValueError, r"input gain with 2 rows, as x has"),
    ],
)
def test_errors_say_what_was_given_and_expected(call, error: type[Exception], sentence: str):
    with pytest.raises(error, match=sentence):
        call(fc.cells.MGUCell(3, 4))


# The runner and the package


def test_the_runner_is_chosen_per_block_and_thread(monkeypatch: pytest.MonkeyPatch):
    seen = []
    with fc.runner("compiled"):
        thread = threading.Thread(target=lambda: seen.append(active_runner()))
        thread.start()
        thread.join()
        with fc.runner("auto"):
            seen.append(active_runner())
        seen.append(active_runner())
    assert seen == ["auto", "auto", "compiled"]
    with pytest.raises(ValueError, match=r"runner\(\) got 'fast'; expected one of 'auto', 'compiled' or 'eager'"):
        fc.runner("fast").__enter__()


def in_process(code: str, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    return result.stdout + result.stderr


def test_the_runner_of_the_environment():
    code = "from fusecell.execution.context import active_runner; print(active_runner())"
    assert in_process(code, FUSECELL_RUNNER="eager").strip() == "eager"
    assert "variable FUSECELL_RUNNER got 'quick'; expected one of" in in_process(code, FUSECELL_RUNNER="quick")


def test_importing_fusecell_is_light_and_its_names_are_what_they_say():
    code = """if True:
        import sys, fusecell as fc
        assert "torch" not in sys.modules and "llvmlite" not in sys.modules
        import fusecell.execution.runners, fusecell.inspection.summary
        print(type(fc.runner).__name__, type(fc.summary).__name__, "GRU" in dir(fc))
    """
    assert in_process(code).split() == ["function", "function", "True"]
    with pytest.raises(AttributeError, match="module 'fusecell' has no attribute 'GRUcell'"):
        fc.GRUcell  # noqa: B018  # asking is the test


def test_the_public_surface():
    assert fc.__all__ == [
        *("Cell", "step", "CELLS", "GRUCell", "LSTMCell", "RNNCell", "GRU", "LSTM", "RNN"),
        *("Recurrent", "Bidirectional", "Sequential", "Stack", "scan", "detach"),
        *("LearnedState", "Projected", "RecurrentDropout", "Residual"),
        *("VariationalDropout", "WeightDrop", "WithReadout", "Zoneout"),
        *(
            "Stream",
            "load_stream",
            "weight_error",
            "export",
            "Ensemble",
            "quantize",
            "replace",
            "wrap",
            "accelerate",
            "Tape",
            "record",
            "runner",
            "recompute",
        ),
        *("linearize", "diagram", "explain", "show_config", "refresh"),
        *("count_cells", "summary", "EagerWarning", "ExportError", "FusecellError", "NotCompilable"),
        *("cells", "init", "quantized", "testing", "weights", "wrappers"),
    ]
    assert all(getattr(fc, name) is not None for name in fc.__all__)
