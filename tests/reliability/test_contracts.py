"""Tensors from cells and callers are checked before machine code, which checks nothing, reads them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusecell as fc

X = torch.randn(7, 300, 5)


class Starting(fc.Cell):
    """A cell with a first state, and noise, of any form."""

    def __init__(self, start=None, noise=None):
        super().__init__(5, 9)
        self.inp, self.rec = nn.Linear(5, 9), nn.Linear(9, 9)
        self.start, self.noise = start, noise
        if noise is not None:
            self.inputs = ("x", "noise")

    def initial_state(self, batch_size, *, dtype=None, device=None):
        return super().initial_state(batch_size, dtype=dtype, device=device) if self.start is None else self.start

    def draw(self, steps, batch_size, *, dtype=None, device=None):
        return () if self.noise is None else (self.noise,)

    def step(self, x, state):
        (h,) = state
        x, noise = x if self.noise is not None else (x, 0.0)
        h = torch.tanh(self.inp(x) + self.rec(h)) + noise
        return h, (h,)


STARTS = {
    "one row for all": (torch.zeros(1, 9),),
    "too narrow": (torch.zeros(300, 3),),
    "without rows": (torch.zeros(9),),
    "with an axis more": (torch.zeros(1, 300, 9),),
    "two of them": (torch.zeros(300, 9),) * 2,
    "no tensor": (0.0,),
}
RESETS = torch.rand(7, 300) < 0.3


@pytest.mark.parametrize("runner", ["auto", "eager"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("start", ["nothing", "a state"])
@pytest.mark.parametrize("kind", STARTS)
def test_first_states(kind, start, training, runner):
    """Initial states and those of resets are checked; kernels once read beyond them."""
    cell = Starting(STARTS[kind])
    state = {"nothing": None, "a state": torch.zeros(300, 9)}[start]
    with torch.set_grad_enabled(training), fc.runner(runner), pytest.raises((TypeError, ValueError), match="state"):
        fc.scan(cell, X, state, resets=RESETS)


@pytest.mark.parametrize("training", [False, True])
def test_first_states_of_another_dtype(training):
    """Regression: a reset would have read bytes of another dtype."""
    cell = Starting((torch.zeros(300, 9, dtype=torch.float64),))
    with (
        torch.set_grad_enabled(training),
        pytest.raises(ValueError, match=r"made h in torch.float64 on cpu, asked for"),
    ):
        fc.scan(cell, X, torch.zeros(300, 9), resets=RESETS)


def test_first_states_of_streams_and_tapes():
    for call in (lambda cell: fc.Stream(cell, 300), lambda cell: fc.record(fc.Recurrent(cell), X)):
        with pytest.raises(ValueError, match=r"expected state h of shape \(300, 9\), got \(300, 3\)"):
            call(Starting((torch.zeros(300, 3),)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 9), (7, 1, 9), (3, 300, 9), (7, 299, 9), (7,)], ids=str)
def test_tensors_from_draw_are_checked(shape, training):
    with torch.set_grad_enabled(training), pytest.raises(ValueError, match="draw returned a tensor of shape"):
        fc.scan(Starting(noise=torch.zeros(shape)), X)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "weight", [torch.zeros(9, 9, device="meta"), torch.eye(9).to_sparse()], ids=["on meta", "sparse"]
)
def test_a_weight_without_memory_of_its_own(weight, training):
    """A weight on ``meta`` has no memory to read, and that of a sparse one holds something else."""
    cell = Starting()
    with torch.set_grad_enabled(training), fc.runner("compiled"):
        fc.scan(cell, X)
        cell.rec.weight = nn.Parameter(weight)
        with pytest.raises(fc.NotCompilable, match=r"The cell's rec\.weight is not a dense tensor on the CPU"):
            fc.scan(cell, X)


class Caught(Exception):
    pass


@pytest.fixture(scope="module")
def arguments():
    """The arguments of torch's operator, for inference and for training."""
    from fusecell.compiler.dispatch import scan_operator
    from fusecell.compiler.dispatch import torch_compile as operator

    calls = {}
    for training in (False, True):

        def catch(*args):
            calls[training] = scan_operator.ScanArguments(*args)  # noqa: B023  # called in this turn
            raise Caught

        with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(training):
            patch.setattr(operator, "scan", catch)
            h = torch.zeros(4, 9)
            with pytest.raises(Caught):
                operator.run_traced(fc.GRUCell(5, 9), (torch.randn(7, 4, 5),), (h,), _options())
    return calls


def _options():
    from fusecell.execution.options import Options

    return Options(torch.tensor([7, 0, 2, 7]), torch.zeros(7, 4, dtype=torch.bool))


CHANGES = {
    "fewer rows of state": ("state", [torch.zeros(3, 9)], r"state 'h' of shape \(4, 9\).* got \(3, 9\)"),
    "a narrow state": ("state", [torch.zeros(4, 8)], r"state 'h' of shape \(4, 9\).* got \(4, 8\)"),
    "no state": ("state", [], r"state to be 1 tensors \('h'\).* got 0"),
    "no state to go back to": ("start", [], "start to be 1 tensors"),
    "no input": ("inputs", [], r"inputs to be 1 tensors \('x'\).* got 0"),
    "a wide input": ("inputs", [torch.zeros(7, 4, 6)], r"inputs 'x' of shape .* with 5 features.* got \(7, 4, 6\)"),
    "an input of one axis": ("inputs", [torch.zeros(5)], r"inputs 'x' to be \(T, N, ...\).* got \(5,\)"),
    "an input without steps": ("inputs", [torch.zeros(0, 4, 5)], r"none of them 0.* got \(0, 4, 5\)"),
    "an input in float64": (
        "inputs",
        [torch.zeros(7, 4, 5, dtype=torch.float64)],
        r"inputs 'x' to be a dense torch.float32",
    ),
    "a weight less": ("weights", [], "weights to be 4 tensors"),
    "small weights": ("weights", [torch.zeros(1, 1)] * 4, r"weights 'weight_ih' of shape \(27, 5\).* got \(1, 1\)"),
    "two lengths": ("lengths", torch.tensor([1, 2]), r"lengths of shape \(4,\).* got \(2,\)"),
    "lengths in 32 bits": ("lengths", torch.ones(4, dtype=torch.int32), "lengths to be a dense torch.int64"),
    "resets of another shape": ("resets", torch.zeros(4, 7, dtype=torch.bool), r"resets of shape \(7, 4\)"),
    "resets in 32 bits": ("resets", torch.zeros(7, 4), "resets to be a dense torch.bool"),
    "no graph": ("graph", "os.system('true')", "a graph that it can't run: not a graph"),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", CHANGES)
def test_the_operator_called_by_hand(arguments, training, kind):
    name, value, text = CHANGES[kind]
    call = arguments[training]
    results = torch.ops.fusecell.scan(*call)
    with pytest.raises(ValueError, match=text):
        torch.ops.fusecell.scan(*call._replace(**{name: value}))
    if training:
        *grads, saved = results
        torch.ops.fusecell.scan_backward(saved, grads, *call)
        with pytest.raises(ValueError, match=text):
            torch.ops.fusecell.scan_backward(saved, grads, *call._replace(**{name: value}))


def test_arguments_of_the_operators_backward_are_checked(arguments):
    call = arguments[True]
    *grads, saved = torch.ops.fusecell.scan(*call)
    every_other = torch.zeros(2 * len(saved))[::2]
    for wrong, text in (
        ((saved[:-1], grads), r"saved of shape"),
        ((every_other, grads), r"saved as fusecell::scan has returned it.* stride \(2,\)"),
        ((saved.double(), grads), "saved to be a dense torch.float32"),
        ((saved, grads[:-1]), "grads to be 2 tensors"),
        ((saved, [grads[0][:-1], *grads[1:]]), r"grads\[0\] of shape \(7, 4, 9\).* got \(6, 4, 9\)"),
        ((saved, [grads[0], grads[1].double()]), r"grads\[1\] to be a dense torch.float32"),
    ):
        with pytest.raises(ValueError, match=text):
            torch.ops.fusecell.scan_backward(*wrong, *call)
    with pytest.raises(ValueError, match="expected wanted to have 5 flags, got 2"):
        torch.ops.fusecell.scan(*call._replace(wanted=[True, False]))
    with pytest.raises(ValueError, match="expected wanted, a flag for each"):
        torch.ops.fusecell.scan_backward(saved, grads, *arguments[False])


@pytest.mark.parametrize("training", [False, True])
def test_the_operators_graph_has_the_types_of_its_states(arguments, training):
    """Regression: a new state narrower than the state was read and written out of bounds."""
    call = arguments[training]
    lines = call.graph.splitlines()
    (state,) = (place for place, line in enumerate(lines) if line.startswith("return state.h"))
    lines[state] = "return state.h = x"
    with pytest.raises(ValueError, match=r"the new value of state h is row\[5\], expected row\[9\]"):
        torch.ops.fusecell.scan(*call._replace(graph="\n".join(lines) + "\n"))


@pytest.mark.parametrize("name", ["order", "starts", "strips", "h_rows", "state_h"])
def test_notes_may_have_the_names_of_kernel_buffers(name):
    """Regression: two buffers of one name shared memory."""
    cell = Named(name)
    x, lengths = torch.randn(7, 6, 5), [7, 3, 5, 1, 0, 7]
    with torch.no_grad():
        with fc.runner("compiled"):
            actual, _ = fc.scan(cell, x, lengths=lengths)
        with fc.runner("eager"):
            expected, _ = fc.scan(cell, x, lengths=lengths)
    assert torch.allclose(actual, expected, atol=1e-6)


class Named(fc.Cell):
    """A step whose value between two products, stored in a buffer, has any name."""

    def __init__(self, name):
        super().__init__(5, 9)
        self.inp, self.rec, self.out = nn.Linear(5, 9), nn.Linear(9, 9), nn.Linear(9, 9)
        self.name = name.replace("_", ".")

    def step(self, x, state):
        (h,) = state
        inner = self.note(self.name, torch.tanh(self.inp(x) + self.rec(h)))
        h = torch.tanh(self.out(inner) * h)
        return h, (h,)
