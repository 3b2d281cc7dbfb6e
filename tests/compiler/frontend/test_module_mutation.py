"""A step that changes its module is refused by attribute and line, and runs as the loop; tracing changes nothing."""

from __future__ import annotations

import copy
import functools
import random
import re
import warnings
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fusecell as fc
from fusecell.compiler.frontend import Traced, trace
from fusecell.compiler.refusal import Refusal
from fusecell.module_snapshot import Snapshot


class Slotted:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Changing(fc.Cell):
    """A cell with one attribute of every kind that a step could change."""

    def __init__(self, change: Callable[[Any, Tensor], Any]) -> None:
        super().__init__(3, 3)
        self.change = change
        self.w = nn.Parameter(torch.randn(3))
        self.register_buffer("buf", torch.rand(3))
        self.count = 0
        self.mem = None
        self.spare = 1
        self.part = nn.Linear(3, 3)
        self.parts = nn.ModuleList([nn.Linear(3, 3)])
        self.entries: list[Any] = [0.5]
        self.table = {"a": 0.5, "inner": {"b": [1]}}
        self.names = {"a"}
        self.recent: deque[Any] = deque([1], maxlen=4)
        self.helper = SimpleNamespace(count=0, part=nn.Linear(3, 3))
        self.slotted = Slotted()
        self.numbers = np.zeros(3)
        self.generator = random.Random(0)
        self.tensors = [torch.ones(3)]

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> Any:
        self.change(self, x)
        h = torch.tanh(self.part(x) + 0.5 * state[0] + self.buf + (0.1 if self.count > 4 else 0.0))
        return h, (h,)

    @functools.cached_property
    def half(self) -> float:
        return 0.5


def _no_grad(change: Callable[[Any], Any]) -> Callable[[Any, Tensor], None]:
    def changed(c: Any, x: Tensor) -> None:
        with torch.no_grad():
            change(c)

    return changed


def _set(name: str, value: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], None]:
    def change(c: Any, x: Tensor) -> None:
        owner, _, last = name.rpartition(".")
        target = functools.reduce(getattr, owner.split("."), c) if owner else c
        setattr(target, last, value(c, x))

    return change


def _entry(c: Any, x: Tensor) -> None:
    c.table["inner"]["c"] = 2


def _array(c: Any, x: Tensor) -> None:
    c.numbers[1] += 1


def _raising(c: Any, x: Tensor) -> None:
    c.count += 1
    c.entries.append(x)
    if x.shape[0] > 2:
        raise RuntimeError("not for so many rows")


CHANGES: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "counter": (_set("count", lambda c, x: c.count + 1), "sets self.count"),
    "memory": (_set("mem", lambda c, x: x if c.mem is None else 0.9 * c.mem + x), "sets self.mem"),
    "cache": (lambda c, x: c.mem is None and setattr(c, "mem", torch.zeros_like(x) + 0.1), "sets self.mem"),
    "added": (_set("extra", lambda c, x: 1), "adds self.extra"),
    "cached_by_hand": (lambda c, x: hasattr(c, "third") or setattr(c, "third", 1 / 3), "adds self.third"),
    "cached_property_and_more": (lambda c, x: (c.half, setattr(c, "extra", 1)), "adds self.extra"),
    "deleted": (lambda c, x: hasattr(c, "spare") and delattr(c, "spare"), "deletes self.spare"),
    "buffer_set": (_set("buf", lambda c, x: c.buf * 0.9), "sets self.buf"),
    "buffer_in_place": (lambda c, x: c.buf.add_(1), "changes self.buf in place"),
    "buffer_copied": (_no_grad(lambda c: c.buf.copy_(c.w)), "changes self.buf in place"),
    "buffer_part": (lambda c, x: c.buf[:1].mul_(0.5), "changes self.buf in place"),
    "parameter_in_place": (_no_grad(lambda c: c.w.mul_(0.9)), "changes self.w in place"),
    "parameter_data": (lambda c, x: c.w.data.mul_(0.9), "changes self.w in place"),
    "parameter_new_data": (_set("w.data", lambda c, x: c.w.data * 0.9), "changes self.w"),
    "parameter_frozen": (lambda c, x: c.w.requires_grad_(False), "changes self.w"),
    "parameter_hook": (lambda c, x: c.w.register_hook(lambda g: g * 2), "changes self.w"),
    "submodule": (_set("part.count", lambda c, x: 1), "adds self.part.count"),
    "submodule_buffer": (_no_grad(lambda c: c.parts[0].bias.add_(0.1)), r"changes self.parts.0.bias in place"),
    "mode": (lambda c, x: c.part.eval(), "sets self.part.training"),
    "list": (lambda c, x: c.entries.append(1.0), "changes self.entries"),
    "dict": (_entry, r"adds self.table\['inner'\]"),
    "set": (lambda c, x: c.names.add(len(c.names)), "changes self.names"),
    "deque": (lambda c, x: c.recent.append(2), "changes self.recent"),
    "object": (_set("helper.count", lambda c, x: c.helper.count + 1), "sets self.helper.count"),
    "object_s_module": (_set("helper.part.count", lambda c, x: 1), "adds self.helper.part.count"),
    "slots": (_set("slotted.count", lambda c, x: c.slotted.count + 1), "sets self.slotted.count"),
    "array": (_array, "changes self.numbers"),
    "generator": (lambda c, x: c.generator.random(), "draws from self.generator"),
    "tensor_in_a_list": (lambda c, x: c.tensors[0].add_(1), "changes in place a tensor of shape"),
    "raising": (_raising, "sets self.count"),
}


def make(name: str) -> Changing:
    torch.manual_seed(0)
    return Changing(CHANGES[name][0]).double()


def contents(value: Any) -> Any:
    """Return everything a module holds in comparable form, without using the code under test."""
    if isinstance(value, Tensor):
        return (
            "tensor", value.detach().tolist(), value.requires_grad, value.data_ptr(), len(value._backward_hooks or ()),
        )  # fmt: skip
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Slotted):
        return value.count
    if isinstance(value, dict):
        return {key: contents(item) for key, item in value.items()}
    if isinstance(value, list | tuple | deque):
        return [type(value).__name__, *map(contents, value)]
    if isinstance(value, nn.Module | SimpleNamespace):
        return contents(vars(value))
    return value.copy() if isinstance(value, set) else value


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_a_trace_leaves_the_module_as_it_was(name: str, gradients: bool) -> None:
    cell = make(name)
    before = contents(cell)
    result = trace(cell, [(3,)], torch.float64, gradients=gradients)
    assert isinstance(result, Refusal)
    assert contents(cell) == before


@pytest.mark.parametrize("name", CHANGES)
def test_the_reason_names_attribute_and_line(name: str) -> None:
    with pytest.raises(fc.NotCompilable, match=CHANGES[name][1]) as raised, fc.runner("compiled"):
        fc.scan(make(name), torch.ones(4, 2, 3, dtype=torch.float64))
    assert re.search(r"test_module_mutation\.py, line \d+: `.+`", str(raised.value)), raised.value
    assert 'states = ("h", "' in str(raised.value) or "as a state" in str(raised.value)


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "raising"])
def test_results_equal_those_of_the_loop(name: str) -> None:
    """Results of repeated calls equal the loop's, changes of the module included."""
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 2, 3)
    fc.refresh()  # warnings of other tests
    results = []
    for runner in ("auto", "eager"):
        cell, outputs = make(name), []
        with warnings.catch_warnings(record=True) as warned, fc.runner(runner):
            warnings.simplefilter("always")
            for _ in range(6):
                with torch.no_grad():
                    outputs.append(fc.scan(cell, x)[0])
        eager_warnings = [w for w in warned if issubclass(w.category, fc.EagerWarning)]
        results.append((torch.stack(outputs), len(eager_warnings)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-10, atol=1e-10)
    assert results[0][1] >= 1


class Counter(fc.Cell):
    def __init__(self) -> None:
        super().__init__(3, 3)
        self.t = 0

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> Any:
        self.t += 1
        h = torch.tanh(x + state[0] * (0.5 if self.t > 4 else 1.0))
        return h, (h,)


def test_the_reason_names_the_line_of_the_statement() -> None:
    result = trace(Counter(), [(3,)], torch.float32, gradients=False)
    assert isinstance(result, Refusal)
    line = Counter.step.__code__.co_firstlineno + 1
    assert f"it sets self.t in test_module_mutation.py, line {line}: `self.t += 1`" in result.reasons[0]
    assert result.changes == ("t",)


def test_the_advised_fix_is_compiled() -> None:
    class Counted(fc.Cell):
        states = ("h", "t")
        state_sizes = (3, 1)

        def step(self, x: Tensor, state: tuple[Tensor, ...]) -> Any:
            h, t = state
            t = t + 1
            h = torch.tanh(x + h * torch.where(t > 4, 0.5, 1.0))
            return h, (h, t)

    x = torch.ones(8, 2, 3)
    with fc.runner("eager"):
        expected, _ = fc.scan(Counter(), x)
    with fc.runner("compiled"):
        actual, _ = fc.scan(Counted(3, 3), x)
    torch.testing.assert_close(actual, expected)


def test_a_counter_is_traced_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    import fusecell.compiler.programs.inference as inference

    traces: list[fc.Cell] = []

    def counted(cell: fc.Cell, *args: Any, **options: Any) -> Any:
        traces.append(cell)
        return trace(cell, *args, **options)

    monkeypatch.setattr(inference, "trace", counted)
    cell, x = Counter(), torch.ones(2, 2, 3)
    fc.refresh()
    with warnings.catch_warnings(record=True) as warned, torch.no_grad():
        warnings.simplefilter("always")
        for _ in range(10):
            fc.scan(cell, x)
    assert len(traces) == 3
    assert len([w for w in warned if issubclass(w.category, fc.EagerWarning)]) == 1
    assert cell.t == 20


def test_a_value_cached_at_the_first_call_is_compiled_at_the_second() -> None:
    cell = make("cached_by_hand")
    x = torch.ones(2, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fc.EagerWarning)
            first, _ = fc.scan(cell, x)
        with fc.runner("compiled"):
            second, _ = fc.scan(cell, x)
    torch.testing.assert_close(second, first, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gradients", [False, True])
def test_cached_properties_are_compiled_at_once(gradients: bool) -> None:
    """Evaluated before the step is traced, of parts as well."""

    class Part(nn.Module):
        @functools.cached_property
        def rates(self) -> Tensor:
            return torch.linspace(0.1, 0.9, 3, dtype=torch.float64)

    cell = Changing(lambda c, x: (c.half, c.decay.rates)).double()
    cell.decay = Part()
    x = torch.ones(2, 2, 3, dtype=torch.float64)
    with torch.set_grad_enabled(gradients):
        with fc.runner("compiled"):
            first, _ = fc.scan(cell, x)
        assert cell.half == 0.5
        with fc.runner("eager"):
            second, _ = fc.scan(cell, x)
    torch.testing.assert_close(second, first, rtol=1e-10, atol=1e-10)


def test_a_restored_value_is_no_change() -> None:
    def change(c: Any, x: Tensor) -> None:
        before, c.count = c.count, 7
        c.extra = x
        del c.extra
        c.count = before
        c.spare = 1

    assert isinstance(trace(Changing(change), [(3,)], torch.float32, gradients=True), Traced)


def test_a_debuggers_trace_function_stays() -> None:
    import sys

    def trace_function(*_: Any) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(trace_function)
    try:
        trace(Counter(), [(3,)], torch.float32, gradients=False)
        assert sys.gettrace() is trace_function
    finally:
        sys.settrace(before)


def test_streams() -> None:
    with pytest.raises(fc.NotCompilable, match=r"sets self.t in test_module_mutation.py, line \d+"):
        fc.Stream(Counter())


def test_a_readout_of_a_stream_is_left_as_it_was() -> None:
    class Readout(nn.Module):
        calls = 0

        def forward(self, y: Tensor) -> Tensor:
            self.calls += 1
            return y

    readout = Readout()
    with pytest.raises(fc.NotCompilable, match=r"self\.module\.calls"):
        fc.Stream(fc.Sequential(fc.GRUCell(3, 4), readout))
    assert "calls" not in vars(readout)


def test_torchs_operator() -> None:
    cell = Counter()
    layer = fc.Recurrent(cell)
    x = torch.ones(8, 2, 3)
    with pytest.warns(
        fc.EagerWarning, match=r"is unrolled: The step changes the module: it sets self.t in test_module_mut"
    ):
        torch.export.export(layer, (x,))


def test_wrappers_try_a_step_and_leave_the_cell_as_it_was() -> None:
    class Noting(Counter):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.rec = nn.Linear(3, 3)

        def step(self, x: Tensor, state: tuple[Tensor, ...]) -> Any:
            self.t += 1
            self.seen.add_(1)
            h = self.note("n", torch.tanh(x + self.rec(state[0])))
            return h, (h,)

    cell = Noting()
    fc.RecurrentDropout(cell)
    fc.VariationalDropout(cell, state=0.5)
    assert cell.t == 0
    assert cell.seen == 0


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "raising"])
def test_check_cell(name: str) -> None:
    cell = make(name)
    with fc.runner("eager"), pytest.raises(fc.testing.CellCheckError) as raised:
        fc.testing.check_cell(cell, skip=set(fc.testing.CHECKS) - {"module"})
    ((check, sentence),) = raised.value.failures
    assert check == "module"
    pattern = CHANGES[name][1].replace(" in place", "").replace("changes a tensor of shape", "changes self.tensors")
    assert re.search(pattern, sentence), sentence
    assert re.search(r"test_module_mutation\.py, line \d+: `.+`", sentence), sentence


def test_check_cell_leaves_the_cell_as_it_was() -> None:
    cell = make("memory")
    before = contents(cell)
    with fc.runner("eager"), pytest.raises(fc.testing.CellCheckError):
        fc.testing.check_cell(cell)
    assert contents(cell) == before


def test_a_snapshot_puts_back_what_it_saw() -> None:
    for name, (change, _) in CHANGES.items():
        cell = make(name)
        before, snapshot = contents(cell), Snapshot(cell, values=True)
        assert not snapshot.changes()
        try:
            change(cell, torch.ones(3, 3, dtype=torch.float64))
        except RuntimeError:
            assert name in ("raising", "buffer_in_place")
        assert snapshot.changes(), name
        snapshot.restore()
        assert contents(cell) == before, name
        assert not snapshot.changes(), name


def test_a_copy_of_a_cell_that_was_traced_is_like_it() -> None:
    cell = make("list")
    trace(cell, [(3,)], torch.float64, gradients=False)
    assert copy.deepcopy(cell).entries == [0.5]


def test_a_parameter_is_to_be_changed_between_calls_or_copied() -> None:
    """A clamp of weights, as some recurrent layers have it in their forward, is no state."""
    with (
        pytest.raises(fc.NotCompilable, match=r"after each step of the optimizer.*self\.w\.clamp"),
        fc.runner("compiled"),
    ):
        fc.scan(make("parameter_data"), torch.zeros(3, 2, 3, dtype=torch.float64))
