"""The page of cells to play with, in Debian's chromium, without a network: its numbers are those of torch.nn."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch import nn

from fusecell.play import KINDS, page, train_models
from fusecell.play.models import ALPHABET, encode
from tests.paths import ROOT
from tests.play.reference import held_gru

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARTEFACTS = ROOT / "test-artefacts"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
TEXT = "the cat sat, on the mat"
PREDICTED = "({ cell, run }) => run.outputs.map((_, t) => [...cell.prediction(run, t)])"
TORCHS = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn_tanh": nn.RNN}


@pytest.fixture(scope="module")
def models():
    """Models after a few updates, by task and kind: all that is compared needs no good ones."""
    return {(model.task, model.kind): model for model in train_models(updates=20)}


@pytest.fixture(scope="module")
def path(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("pages") / "play.html"
    path.write_text(page(list(models.values())), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, path):
    """Return a function that opens the page offline; a console message, or asking for anything, fails the test."""
    contexts, messages = [], []

    def open_page(**options):
        context = browser.new_context(**{"locale": "en-GB", "viewport": {"width": 1200, "height": 900}, **options})
        context.set_offline(True)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))

        def on_request(request):
            if request.url != f"file://{path}" and not request.url.startswith("data:"):
                messages.append(f"asked for {request.url}")

        tab.on("request", on_request)
        tab.goto(f"file://{path}")
        tab.wait_for_selector("html[data-ready]", state="attached")
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert messages == []


def shot(tab, name):
    ARTEFACTS.mkdir(exist_ok=True)
    tab.screenshot(path=ARTEFACTS / f"{name}.png", full_page=True)


def shown(tab, name, pane=0):
    """Return a value of a cell of the page over all steps, (steps, units)."""
    script = f"({{ cell, run }}) => run.outputs.map((_, t) => [...cell.value(run, '{name}', t)])"
    return torch.tensor(tab.evaluate(f"({script})(app.panes[{pane}])"))


def layer_of(model) -> nn.Module:
    """Return torch.nn's layer with a model's weights."""
    layer = TORCHS[model.kind](model.cell.cell.input_size, model.cell.hidden_size)
    layer.load_state_dict({f"{name}_l0": value for name, value in model.cell.cell.state_dict().items()})
    return layer


def near(values, expected):
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)


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


def row(tab, name, pane=0):
    return tab.locator(".pane").nth(pane).locator(f'.value[data-name="{name}"]')


def read_text(tab, *kinds, text=TEXT):
    """Let the cells read a text."""
    tab.evaluate("([text, kinds]) => { app.text = text; return app.chooseTask('text', kinds); }", [text, list(kinds)])


def drag(tab, bars, unit, height, units=32):
    """Pull a bar to a height between 0, the lower edge, and 1."""
    bars.scroll_into_view_if_needed()
    box = bars.bounding_box()
    x = box["x"] + (unit + 0.5) * box["width"] / units
    tab.mouse.move(x, box["y"] + box["height"] / 2)
    tab.mouse.down()
    tab.mouse.move(x, box["y"] + (1 - height) * box["height"], steps=3)
    tab.mouse.up()


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


def test_a_curve_is_drawn_by_pointer_and_by_keys(models, visit):
    tab = visit()
    tab.check("[name=task][value=curve]")
    tab.wait_for_function("app.task === 'curve' && app.inputs.length === 70")
    tab.click("#flat")
    canvas = tab.locator("#drawing")
    box = canvas.bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 20.5 / 70, box["y"] + box["height"] * 0.5)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] * 30.5 / 70, box["y"] + box["height"] * (0.5 - 0.42 * 0.5))
    tab.mouse.up()
    curve = torch.tensor(tab.evaluate("[...app.curve]"))
    assert curve[:20].abs().max() < 0.02
    np.testing.assert_allclose(curve[20:31], np.linspace(0, 0.5, 11), atol=0.03)  # a pixel is 0.02
    assert tab.evaluate("app.step") == 30
    canvas.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown"):
        tab.keyboard.press(key)
    curve[32] -= 0.1
    near(torch.tensor(tab.evaluate("[...app.curve]")), curve)
    with torch.no_grad():
        near(shown(tab, "h"), layer_of(models["curve", "gru"])(curve[:, None])[0])
    assert "expects" in tab.locator(".guess").first.inner_text()


def test_the_change_since_a_moment_is_shown(visit):
    """Nothing before the letter that is changed differs, and something after it does."""
    tab = visit()
    read_text(tab, "gru", "rnn_tanh")
    tab.check("#pin")
    tab.fill("#text", TEXT[:10] + "x" + TEXT[11:])
    pixels = """() => { const canvas = document.querySelector('[data-name=h] .heat');
      const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data, found = [];
      for (let t = 0; t < canvas.width; t++) { let most = 0;
        for (let u = 0; u < canvas.height; u++) most = Math.max(most, Math.abs(data[4 * (u * canvas.width + t)] - 247));
        found.push(most); } return found; }"""
    changed = tab.evaluate(pixels)
    assert len(changed) == len(TEXT)
    assert max(changed[:10]) <= 1  # the middle of the colours
    assert changed[10] > 20


STORIES = {"frozen": ("never changes", "记忆永不改变"), "carousel": ("error carousel", "误差传送带")}


def test_experiments_in_both_languages(visit):
    tab = visit()
    for name in tab.evaluate("Object.keys(EXPERIMENTS)"):
        tab.click(f"[data-name={name}]")
        tab.wait_for_function(f"document.querySelector('#story').dataset.word === '{name}Story'")
        tab.evaluate("app.measure()")
    for name, stories in STORIES.items():
        for language, story in zip(("en", "zh"), stories, strict=True):
            if tab.get_attribute("html", "lang") != language:
                tab.click("#language")
            tab.click(f"[data-name={name}]")
            tab.wait_for_function(f"document.querySelector('#story').dataset.word === '{name}Story'")
            assert story in tab.inner_text("#story")
            assert tab.title() == {"en": "A cell to play with", "zh": "可以动手玩的循环单元"}[language]
    tab.click("[data-name=frozen]")
    tab.wait_for_function("app.panes[1].cell.model.kind === 'gru'")
    tab.evaluate("app.measure()")
    assert shown(tab, "h", pane=1).abs().max() == 0
    assert "仍高于十分之一" in tab.locator("#lengths li").nth(1).inner_text()
    shot(tab, "play-zh")


def test_no_word_is_missing(visit):
    """Both languages have the same words, every word that the page asks for among them, and every kind of cell."""
    tab = visit()
    english, chinese = tab.evaluate("[Object.keys(words.en), Object.keys(words.zh)]")
    assert english == chinese
    assert set(KINDS) <= set(english)
    asked = tab.evaluate("[...document.querySelectorAll('[data-word]')].map((each) => each.dataset.word)")
    asked += tab.evaluate("[...document.querySelectorAll('[data-label]')].map((each) => each.dataset.label)")
    asked += tab.evaluate("Object.keys(EXPERIMENTS).map((name) => `${name}Story`)")
    assert set(asked) <= set(english)


def test_all_of_it_by_the_keyboard(visit):
    """Whatever can be clicked can be reached by Tab, and has a name."""
    tab = visit()
    reached = set()
    focused = (
        "(e => [e.tagName, e.id, e.className, e.closest('.value')?.dataset.name].join(' '))(document.activeElement)"
    )
    for _ in range(120):
        tab.keyboard.press("Tab")
        reached.add(tab.evaluate(focused))
    for wanted in (
        "CANVAS  bars z",
        "CANVAS  heat h",
        "INPUT step  ",
        "INPUT   z",
        "BUTTON play  ",
        "SELECT  kind ",
        "SUMMARY   ",
    ):
        assert wanted in reached, wanted
    unnamed = tab.evaluate("""
      [...document.querySelectorAll('button, input, select, canvas[tabindex], [role]')].filter((each) =>
        !each.textContent.trim() && !each.getAttribute('aria-label') && !each.labels?.length
      ).map((each) => each.outerHTML)
    """)
    assert unnamed == []


def test_one_small_file_on_a_phone_in_the_dark(path, visit):
    assert path.stat().st_size < 1_000_000
    text = path.read_text(encoding="utf-8")
    assert not [part for part in ("src=", "http:", "https:", "@import") if part in text]
    tab = visit(viewport={"width": 390, "height": 800}, color_scheme="dark", locale="zh-CN", has_touch=True)
    assert tab.get_attribute("html", "lang") == "zh"
    for task in ("curve", "text"):
        tab.evaluate(f"app.chooseTask('{task}', ['lstm', 'gru_reset_before'])")
        tab.check("#compare")
        assert tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
        shot(tab, f"play-phone-{task}")
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.click("#theme")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != dark
