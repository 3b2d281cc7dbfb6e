"""A compiled step follows the functions and numbers that its code mentions, wherever they are defined."""

from __future__ import annotations

import gc
import types
import weakref

import pytest
import torch
from torch import nn

import fusecell as fc
from fusecell.compiler.frontend.signature import definition
from fusecell.compiler.frontend.step_sources import sources_of

ALPHA, SCALE, NAME = 0.5, 2.0, "tanh"


def gate(value):
    return torch.sigmoid(value) * SCALE


def tanh_gate(value):
    return torch.tanh(value)


class Scaled(fc.Cell):
    BETA = 1.0

    def __init__(self):
        super().__init__(3, 3)
        self.linear = nn.Linear(3, 3)

    def helper(self, value):
        return value * self.BETA

    @property
    def decay(self):
        return 0.3

    def step(self, x, state):
        (h,) = state
        h = ALPHA * self.helper(gate(self.linear(x))) + h * self.decay
        return (torch.tanh(h) if NAME == "tanh" else h), (h,)


def change_alpha(patch):
    patch.setitem(globals(), "ALPHA", 0.7)


def change_global_of_a_helper(patch):
    patch.setitem(globals(), "SCALE", 3.0)


def change_helper(patch):
    patch.setitem(globals(), "gate", tanh_gate)


def change_code_of_helper(patch):
    patch.setattr(gate, "__code__", tanh_gate.__code__)


def change_class_attribute(patch):
    patch.setattr(Scaled, "BETA", 4.0)


def change_method(patch):
    patch.setattr(Scaled, "helper", lambda self, value: value * 7)


def change_property(patch):
    patch.setattr(Scaled, "decay", property(lambda self: 0.1))


def change_text(patch):
    patch.setitem(globals(), "NAME", "identity")


def change_of_type(patch):
    patch.setitem(globals(), "ALPHA", 1)


CHANGES = [
    change_alpha,
    change_global_of_a_helper,
    change_helper,
    change_code_of_helper,
    change_class_attribute,
    change_method,
    change_property,
    change_text,
    change_of_type,
]


def outputs(layer, x, runner):
    with fc.runner(runner):
        return [layer(x)[0] for _ in range(3)]  # the second and the third by a prepared call


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_are_followed(change, training, monkeypatch):
    layer, x = fc.Recurrent(Scaled()), torch.randn(5, 2, 3)
    with torch.set_grad_enabled(training):
        before = outputs(layer, x, "compiled")
        change(monkeypatch)
        after, expected = outputs(layer, x, "compiled"), outputs(layer, x, "eager")
        torch.testing.assert_close(after, expected)
        assert not torch.allclose(after[0], before[0])
        monkeypatch.undo()
        torch.testing.assert_close(outputs(layer, x, "compiled"), before)


def test_enclosed_variables_and_functions():
    factor = 2.0

    def scaled(value):
        return value * factor

    class Enclosing(fc.Cell):
        def step(self, x, state):
            (h,) = state
            h = torch.tanh(scaled(x) + h)
            return h, (h,)

    layer, x = fc.Recurrent(Enclosing(3, 3)), torch.randn(5, 2, 3)
    before = outputs(layer, x, "compiled")
    factor = 0.5
    torch.testing.assert_close(outputs(layer, x, "compiled"), outputs(layer, x, "eager"))
    assert not torch.equal(layer(x)[0], before[0])


def make_gate(factor):
    def gate_of_factor(value):
        return value * factor

    return gate_of_factor


def make_step(factor):
    def step(self, x, state):
        h = x * factor + state[0]
        return h, (h,)

    return step


first_gate, second_gate = make_gate(2.0), make_gate(3.0)


class Gated(fc.Cell):
    def step(self, x, state):
        h = torch.tanh(first_gate(x)) + second_gate(x) + state[0]
        return h, (h,)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["first_gate", "second_gate"])
def test_functions_of_one_code_differ_by_what_they_enclose(name, training, monkeypatch):
    layer, x = fc.Recurrent(Gated(3, 3)), torch.randn(5, 2, 3)
    with torch.set_grad_enabled(training):
        before = outputs(layer, x, "compiled")
        monkeypatch.setitem(globals(), name, make_gate(5.0))
        after = outputs(layer, x, "compiled")
        torch.testing.assert_close(after, outputs(layer, x, "eager"))
        assert not torch.allclose(after[0], before[0])


@pytest.mark.parametrize("parameters", ["value, factor={}", "value, *, factor={}"])
def test_functions_of_one_code_differ_by_their_defaults(parameters, monkeypatch):
    def define(factor):
        namespace = {}
        code = compile(f"def gate({parameters.format(factor)}):\n    return value * factor", __file__, "exec")
        exec(code, globals(), namespace)
        monkeypatch.setitem(globals(), "gate", namespace["gate"])

    layer, x = fc.Recurrent(Scaled()), torch.randn(5, 2, 3)
    define(2.0)
    before = outputs(layer, x, "compiled")
    define(5.0)
    after = outputs(layer, x, "compiled")
    torch.testing.assert_close(after, outputs(layer, x, "eager"))
    assert not torch.allclose(after[0], before[0])


def test_a_step_that_is_assigned_with_other_enclosed_variables(monkeypatch):
    class Assigned(fc.Cell):
        step = make_step(2.0)

    layer, x = fc.Recurrent(Assigned(3, 3)), torch.randn(5, 2, 3)
    before = outputs(layer, x, "compiled")
    Assigned.step = make_step(4.0)
    after = outputs(layer, x, "compiled")
    torch.testing.assert_close(after, outputs(layer, x, "eager"))
    assert not torch.allclose(after[0], before[0])


def test_a_module_inside_whose_forward_has_globals(monkeypatch):
    class Inner(nn.Module):
        def forward(self, x):
            return x * ALPHA

    class Outer(fc.Cell):
        def __init__(self):
            super().__init__(3, 3)
            self.inner = Inner()

        def step(self, x, state):
            h = torch.tanh(self.inner(x) + state[0])
            return h, (h,)

    layer, x = fc.Recurrent(Outer()), torch.randn(5, 2, 3)
    outputs(layer, x, "compiled")
    change_alpha(monkeypatch)
    torch.testing.assert_close(outputs(layer, x, "compiled"), outputs(layer, x, "eager"))


def test_a_number_that_changes_all_the_time_is_refused(monkeypatch):
    layer, x = fc.Recurrent(Scaled()), torch.randn(5, 2, 3)
    for value in (0.1, 0.2, 0.3):
        monkeypatch.setitem(globals(), "ALPHA", value)
        outputs(layer, x, "compiled")
    monkeypatch.setitem(globals(), "ALPHA", 0.4)
    with pytest.warns(fc.EagerWarning, match=r"global ALPHA changes again.*register_buffer\(\"ALPHA\""):
        layer(x)


def test_what_is_a_librarys_is_not_followed():
    for kind in (fc.GRUCell, fc.cells.MGUCell, nn.Linear):
        assert sources_of(kind, definition(kind)) is None


def test_nothing_is_kept_alive():
    def make():
        cell = Scaled()

        class Enclosing(fc.Cell):
            def step(self, x, state):
                h = cell.helper(x) + state[0]
                return h, (h,)

        return fc.Recurrent(Enclosing(3, 3)), weakref.ref(cell), weakref.ref(Enclosing)

    layer, cell, kind = make()
    with fc.runner("auto"):
        layer(torch.randn(3, 2, 3))
    del layer
    fc.refresh()
    gc.collect()
    assert cell() is None
    assert kind() is None


def test_recursion_and_many_names_end():
    source = (
        "\n".join(f"N{i} = {i}" for i in range(400))
        + "\ndef f(x):\n    return "
        + " + ".join(["x", *(f"N{i}" for i in range(400))])
    )
    module = types.ModuleType("many")
    exec(compile(source, "many.py", "exec"), module.__dict__)

    class Many(fc.Cell):
        def step(self, x, state):
            h = recursive(x, 3) + 0 * module.f(x) + state[0]
            return h, (h,)

    layer, x = fc.Recurrent(Many(3, 3)), torch.randn(3, 2, 3)
    torch.testing.assert_close(outputs(layer, x, "compiled"), outputs(layer, x, "eager"))


def recursive(x, depth):
    return x if depth == 0 else recursive(x * ALPHA, depth - 1)
