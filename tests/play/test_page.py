"""The numbers of the page of cells to play with are those of torch.nn, whatever is held or changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fusecell as fc
from fusecell.play import page, train_models
from fusecell.play.models import ALPHABET, encode
from tests.play.page_tools import TEXT, TORCHS, drag, layer_of, near, read_text, row, shown
from tests.play.reference import held_gru

pytestmark = pytest.mark.pages

PREDICTED = "({ cell, run }) => run.outputs.map((_, t) => [...cell.prediction(run, t)])"


@pytest.mark.parametrize("kind", list(TORCHS))
def test_the_page_has_torchs_numbers(models, visit, kind):
    """States, gates and predictions of a text, and states of a curve that is drawn."""
    tab = visit()
    tab.fill("#text", TEXT)
    tab.locator(".pane .kind").first.select_option(kind)
    tab.wait_for_function(
        f"app.panes[0].cell.model.kind === '{kind}' && app.panes[0].run.inputs.length === {len(TEXT)}"
    )
    model = models["text", kind]
    with torch.no_grad():
        expected, _ = layer_of(model)(encode(TEXT))
        near(shown(tab, "h"), expected)
        scores = torch.tensor(tab.evaluate(f"({PREDICTED})(app.panes[0])"))
        near(scores, model.cell.readout(expected))
        tab.check("[name=task][value=curve]")
        tab.wait_for_function("app.panes[0].cell.model.task === 'curve' && app.panes[0].run.inputs.length === 70")
        curve = torch.tensor(tab.evaluate("[...app.curve]"))[:, None]
        near(shown(tab, "h"), layer_of(models["curve", kind])(curve)[0])


@pytest.mark.parametrize("kind", ["gru", "gru_reset_before"])
def test_gates_are_held_by_pointer_slider_and_keys(models, visit, kind):
    tab = visit()
    read_text(tab, kind, "lstm")
    drag(tab, row(tab, "r").locator(".bars"), 5, 0.25)
    row(tab, "z").locator(".bars").focus()
    for key in ("ArrowRight", "ArrowRight", "Enter"):  # from unit 5 to 7, held as it is at the cursor's step
        tab.keyboard.press(key)
    at = tab.evaluate("app.step")
    assert at == len(TEXT) - 1
    row(tab, "n").locator("[type=range]").fill("0.5")
    number = tab.evaluate("[...app.panes[0].cell.holds.r.numbers]")[5]
    assert number == pytest.approx(0.25, abs=0.03)
    z = tab.evaluate("[...app.panes[0].cell.holds.z.numbers]")[7]
    assert tab.evaluate("app.unit") == 7
    holds = {("r", 5): number, ("z", 7): z, **{("n", unit): 0.5 for unit in range(32)}}
    model = models["text", kind]
    expected = held_gru(model.cell.cell, encode(TEXT), holds, after=kind == "gru")
    np.testing.assert_allclose(shown(tab, "h"), expected, atol=1e-5)
    # And let go: by a key, by the button, by the button of all.
    row(tab, "z").locator(".bars").press("Delete")
    row(tab, "n").locator(".free").click()
    np.testing.assert_allclose(
        shown(tab, "h"), held_gru(model.cell.cell, encode(TEXT), {("r", 5): number}, after=kind == "gru"), atol=1e-5
    )
    tab.click("#release")
    tab.wait_for_function("Number.isNaN(app.panes[0].cell.holds.r.numbers[5])")
    np.testing.assert_allclose(
        shown(tab, "h"), held_gru(model.cell.cell, encode(TEXT), {}, after=kind == "gru"), atol=1e-5
    )


def test_a_unit_is_held_from_a_step_on(models, visit):
    tab = visit()
    read_text(tab, "gru", "gru")
    tab.check("#fromHere")
    tab.fill("#step", "9")
    bars = row(tab, "h").locator(".bars")
    bars.focus()
    for key in ("ArrowRight", "ArrowUp", "ArrowUp"):
        tab.keyboard.press(key)
    before = shown(tab, "h", pane=1)
    number = before[9, 1].item() + 0.1
    expected = held_gru(models["text", "gru"].cell.cell, encode(TEXT), {("h", 1, 9): number}, after=True)
    np.testing.assert_allclose(shown(tab, "h"), expected, atol=1e-5)
    near(shown(tab, "h")[:9], before[:9])
    bars.dblclick(position={"x": 1.5 / 32 * bars.bounding_box()["width"], "y": 10})
    near(shown(tab, "h"), before)


def test_a_weight_is_changed_and_restored(models, visit):
    tab = visit()
    read_text(tab, "gru", "gru_reset_before")
    box = tab.locator(".pane").first.locator(".weights")
    box.locator("summary").click()
    box.locator(".picture").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowRight"):
        tab.keyboard.press(key)
    assert box.locator(".where").inner_text() == "r 3 ← h 1"
    box.locator(".number").fill("2.5")
    layer = layer_of(models["text", "gru"])
    with torch.no_grad():
        untouched = layer(encode(TEXT))[0]
        layer.weight_hh_l0[3, 1] = 2.5
        near(shown(tab, "h"), layer(encode(TEXT))[0])
        box.locator(".matrix").select_option("bias_ih")
        box.locator(".zero").click()
        layer.bias_ih_l0.zero_()
        near(shown(tab, "h"), layer(encode(TEXT))[0])
        box.locator(".restore").click()
        near(shown(tab, "h"), untouched)


def test_the_same_weights_before_and_after_the_product(models, visit):
    """torch's form by torch, the other by NumPy; and they differ."""
    tab = visit()
    read_text(tab, "gru", "gru_reset_before")
    second = tab.locator(".pane").nth(1).locator(".weights")
    second.locator("summary").click()
    second.locator(".take").click()
    cell = models["text", "gru"].cell.cell
    after, before = shown(tab, "h"), shown(tab, "h", pane=1)
    with torch.no_grad():
        near(after, layer_of(models["text", "gru"])(encode(TEXT))[0])
    np.testing.assert_allclose(before, held_gru(cell, encode(TEXT), {}, after=False), atol=1e-5)
    assert (after - before).abs().max() > 1e-3
    read_text(tab, "gru", "lstm")
    assert second.locator(".take").is_disabled()


@pytest.mark.parametrize("kind", list(TORCHS))
def test_gradients_are_those_of_autograd(models, visit, kind):
    """Norms of d h(T) / d state(T - k) at the cursor, and the length of the memory that is said of them."""
    tab = visit()
    read_text(tab, kind, "gru")
    tab.fill("#step", "17")
    tab.evaluate("app.measure()")
    measured = torch.tensor(tab.evaluate("app.measured[0]"))
    layer, x = layer_of(models["text", kind]).double(), encode(TEXT).double()
    expected = [1.0]
    for k in range(1, 19):
        own = [value.detach() for value in (torch.zeros(1, 32).double(),) * (2 if kind == "lstm" else 1)]
        if k < 18:
            state = layer(x[: 18 - k])[1]
            own = [value.detach() for value in (state if kind == "lstm" else (state,))]

        def last(*state, k=k):
            return layer(x[18 - k : 18], state if kind == "lstm" else state[0])[0][-1]

        parts = torch.autograd.functional.jacobian(last, tuple(own))
        expected.append(sum(part.square().sum() for part in parts).sqrt().item() / 32**0.5)
    torch.testing.assert_close(measured, torch.tensor(expected), rtol=5e-3, atol=1e-6)
    below = [k for k, norm in enumerate(expected) if norm < 0.1]
    said = tab.locator("#lengths li").first.inner_text()
    assert (f"below a tenth after {below[0]} step" if below else "still above a tenth after 18 step") in said


def test_it_goes_on_by_itself(models, visit):
    """What it writes it reads: torch.nn's states of the letters that the page shows are the page's."""
    tab = visit()
    read_text(tab, "gru", "lstm")
    tab.fill("#speed", "60")
    tab.click("#play")
    tab.wait_for_function(f"app.steps() > {len(TEXT) + 8}")
    tab.click("#play")
    assert tab.get_attribute("#play", "aria-pressed") == "false"
    for pane, kind in enumerate(("gru", "lstm")):
        text = tab.locator(".strip").nth(pane).inner_text().replace("\n", "").replace("\u00a0", " ")
        assert text.startswith(TEXT)
        assert set(text) <= set(ALPHABET)
        with torch.no_grad():
            near(shown(tab, "h", pane), layer_of(models["text", kind])(encode(text))[0])
    tab.click("#back")
    assert tab.evaluate("[app.step, app.steps()]") == [0, len(TEXT)]
    row(tab, "h").locator(".heat").press("Space")
    tab.wait_for_function("app.step > 2")
    tab.evaluate("app.play(false)")


def test_other_cells_of_the_zoo(visit, tmp_path):
    """By the names of the zoo, without the experiments, which are of other cells; also weights of other names."""
    kinds = ("co_rnn", "lstm_peephole", "fast_grnn")
    models = train_models(kinds=kinds, updates=1)
    path = tmp_path / "zoo.html"
    path.write_text(page(models), encoding="utf-8")
    tab = visit(path)
    assert not tab.locator("#experiments").is_visible()
    for kind, model in zip(kinds, models, strict=False):
        read_text(tab, kind, kinds[0])
        assert tab.locator(".kind option:checked").first.inner_text() == kind
        with torch.no_grad():
            expected, _ = fc.Recurrent(model.cell.cell)(encode(TEXT)[:, None])
        near(shown(tab, model.cell.cell.states[0]), expected[:, 0])
        box = tab.locator(".pane").first.locator(".weights")
        box.evaluate("box => { box.open = true; }")
        for name in tab.evaluate("Object.keys(app.panes[0].cell.model.weights)"):
            box.locator(".matrix").select_option(name)
            box.locator(".number").fill("0.5")
            assert tab.evaluate(f"app.panes[0].cell.weight('{name}')[0]") == 0.5
    tab.evaluate("app.measure()")
