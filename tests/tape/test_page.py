"""A tape's page in a real browser: Debian's chromium, without network."""

from __future__ import annotations

import re

import pytest
import torch

import fusecell as fc
from tests.paths import ROOT
from tests.tape.hostile_tapes import changed, poisoned

ARTEFACTS = ROOT / "test-artefacts"
pytestmark = pytest.mark.pages


@pytest.fixture
def visit(browser):
    """Return a function that opens a page offline; any console message fails the test."""
    contexts, messages = [], []

    def open_page(path, **options):
        context = browser.new_context(locale="en-GB", viewport={"width": 1100, "height": 900}, **options)
        context.set_offline(True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("requestfailed", lambda request: messages.append(f"asked for {request.url}"))
        page.goto(f"file://{path}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert messages == []


@pytest.fixture(scope="module")
def large():
    torch.manual_seed(0)
    layer = fc.GRU(5, 64, num_layers=2, bidirectional=True)
    return fc.record(layer, torch.randn(200, 3, 5), lengths=[200, 120, 4])


@pytest.fixture(scope="module")
def large_path(large, tmp_path_factory):
    path = tmp_path_factory.mktemp("pages") / "large.html"
    large.save_html(path, rows=(0, 1))
    return path


TEXT = "the cat sat on the mat"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    torch.manual_seed(0)
    layer = fc.Recurrent(fc.Stack(fc.LSTMCell(8, 12), fc.GRUCell(12, 9)))
    tape = fc.record(layer, torch.randn(len(TEXT), 1, 8), labels=list(TEXT), gradients=True)
    tape.outputs.square().sum().backward()
    path = tmp_path_factory.mktemp("pages") / "labelled.html"
    tape.save_html(path, title="a <title> & a </script>")
    return tape, path


def at(page, step, track, tracks):
    """Click the box of a step and track."""
    page.evaluate("scrollTo(0, 0)")
    box = page.locator("#grid").bounding_box()
    cell, height, gap, left = page.evaluate("[grid.cell, grid.height, GAP, LEFT]")
    line = tracks - 1 - track
    page.mouse.click(box["x"] + left + (step + 0.5) * cell, box["y"] + line * (height + gap) + 4 + height / 2)


def numbers(page, name):
    """Return the numbers shown for a value."""
    details = page.locator(f'details[data-name="{name}"]')
    if details.get_attribute("open") is None:
        details.locator("summary").click()
    details.locator("span").first.wait_for()
    return torch.tensor([float(text) for text in details.locator("span").all_inner_texts()])


def shot(page, name):
    ARTEFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTEFACTS / f"{name}.png")


def test_a_page_is_one_small_file(large, visit, tmp_path):
    """Below 1.2 MB, an LSTM's too, with the library of its charts, which is read only after the page is shown."""
    path = tmp_path / "page.html"
    large.save_html(path)
    assert path.stat().st_size < 900_000
    fc.record(fc.LSTM(5, 64, num_layers=2, bidirectional=True), torch.randn(200, 1, 5)).save_html(
        tmp_path / "lstm.html"
    )
    assert (tmp_path / "lstm.html").stat().st_size < 1_200_000
    assert "Permission to use, copy, modify" in path.read_text()
    page = visit(path)
    assert page.evaluate("performance.getEntriesByType('resource').length") == 0
    assert page.evaluate("[...document.querySelectorAll('.library')].map((each) => each.type)") == ["text/plain"] * 2
    assert page.evaluate("document.querySelector('body script:not([type])').textContent.length") < 100_000
    assert "200 steps × 2 direction(s) × 2 layer(s) = 800 cell calls" in page.inner_text("#formula")
    assert fc.count_cells(fc.GRU(5, 64, num_layers=2, bidirectional=True), 200) == 800
    page.wait_for_selector("html[data-ready]", state="attached")
    for name in ("norms", "saturation", "memory"):
        assert page.locator(f"#{name} svg").count() > 0
    shot(page, "page")


@pytest.mark.parametrize(("step", "track"), [(0, 0), (17, 1), (119, 3), (60, 2)])
def test_a_click_shows_the_tensors_numbers(large, large_path, visit, step, track):
    page = visit(large_path)
    page.select_option("#row", "1")
    at(page, step, track, 4)
    layer, direction = divmod(track, 2)
    assert f"Layer {layer}, GRUCell, {('forward', 'backward')[direction]}, step {step}" in page.inner_text("#where")
    for name in ("r", "z", "n", "h"):
        torch.testing.assert_close(numbers(page, name), large.value(name, layer, direction)[step, 1], atol=1e-4, rtol=0)


def test_equations_have_the_numbers_in_them(large, large_path, visit):
    page = visit(large_path)
    for step, track, unit in ((0, 0, 5), (31, 0, 63), (199, 1, 0), (31, 3, 7)):
        at(page, step, track, 4)
        page.fill("#unit", str(unit))
        page.press("#unit", "Enter")
        layer, direction = divmod(track, 2)
        r, z, n, h = (large.value(name, layer, direction)[step, 0, unit].item() for name in ("r", "z", "n", "h"))
        text = page.inner_text("#equations")
        for name, value in (("r", r), ("z", z), ("n", n)):
            assert float(re.search(rf"^    {name} = (\S+)$", text, re.M)[1]) == pytest.approx(value, abs=1e-4)
        line = re.search(r"^    h' = (.*) = (\S+)$", text, re.M)
        assert float(line[2]) == pytest.approx(h, abs=1e-4)
        assert eval(line[1].replace("·", "*")) == pytest.approx(h, abs=5e-4)  # the right side, computed


def test_one_cursor_in_all_views(large, large_path, visit):
    page = visit(large_path)
    page.wait_for_selector("html[data-ready]", state="attached")
    heatmap = page.locator('.heatmap canvas[data-name="z"]')
    box = heatmap.bounding_box()
    heatmap.click(position={"x": box["width"] * 0.5025, "y": box["height"] * 0.51})
    assert page.input_value("#step") == "100"
    assert page.input_value("#unit") == "32"
    assert "step 100" in page.inner_text("#where")
    lefts = page.evaluate("[...document.querySelectorAll('.cursor')].map((each) => each.style.left)")
    assert set(lefts) == {"50%"}
    assert page.get_attribute("#norms", "data-step") == "100"
    torch.testing.assert_close(numbers(page, "z"), large.value("z")[100, 0], atol=1e-4, rtol=0)
    shot(page, "cursor")


def test_numbers_under_the_mouse(large, large_path, visit):
    page = visit(large_path)
    canvas = page.locator('.heatmap canvas[data-name="n"]')
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    canvas.hover(position={"x": box["width"] * 0.2525, "y": box["height"] * 0.51})
    text = page.inner_text("#tip")
    assert text.startswith("n[32], step 50: ")
    assert float(text.split(": ")[1]) == pytest.approx(large.value("n")[50, 0, 32].item(), abs=1e-4)
    page.evaluate("scrollTo(0, 0)")
    page.hover("h1")
    assert page.locator("#tip").is_hidden()
    page.hover("#vectors .vector:nth-child(2) canvas", position={"x": 3, "y": 10})
    assert page.inner_text("#tip").startswith("z[0] = ")


def test_units_that_stand_out(large, large_path, visit):
    page = visit(large_path)
    page.wait_for_selector("html[data-ready]", state="attached")
    page.select_option("#unitsOf", "h")
    page.select_option("#measure", "variesMost")
    deviation = large.value("h")[:, 0].std(0, unbiased=False)
    best = deviation.topk(8)
    listed = [text.split(": ") for text in page.locator("#units button").all_inner_texts()]
    assert [int(unit) for unit, _ in listed] == best.indices.tolist()
    assert [float(number) for _, number in listed] == pytest.approx(best.values.tolist(), abs=1e-4)
    page.locator("#units button").nth(2).click()
    unit = best.indices[2].item()
    assert page.input_value("#unit") == str(unit)
    assert page.input_value("#step") == str(large.value("h")[:, 0, unit].abs().argmax().item())
    page.select_option("#measure", "smallestMean")
    smallest = large.value("h")[:, 0].mean(0)
    first = page.locator("#units button").first.inner_text().split(": ")
    assert int(first[0]) == smallest.argmin().item()
    assert float(first[1]) == pytest.approx(smallest.min().item(), abs=1e-4)


def test_pictures_can_be_saved(large_path, visit, tmp_path):
    page = visit(large_path)
    page.wait_for_selector("html[data-ready]", state="attached")
    for button, name, begins in (
        ("#save-norms", "norms.svg", b"<svg"),
        ("#save-memory", "memory.svg", b"<svg"),
        ("#saveGrid", "unrolled.png", b"\x89PNG"),
        ('.heatmap:has(canvas[data-name="z"]) button', "z-0.png", b"\x89PNG"),
    ):
        with page.expect_download() as download:
            page.click(button)
        assert download.value.suggested_filename == name
        download.value.save_as(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        assert content.startswith(begins)
        assert len(content) > 2000


def test_keyboard_language_theme_and_lengths(large_path, visit):
    page = visit(large_path)
    page.locator("#grid").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "PageDown", "ArrowUp"):
        page.keyboard.press(key)
    assert "Layer 0, GRUCell, backward, step 11" in page.inner_text("#where")
    page.keyboard.press("End")
    assert page.input_value("#step") == "199"
    page.select_option("#row", "1")
    assert "beyond this row's length" in page.inner_text("#equations")
    page.click("#language")
    assert "200 个时间步 × 2 个方向 × 2 层 = 800 次 cell 调用" in page.inner_text("#formula")
    assert page.get_attribute("html", "lang") == "zh"
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    shot(page, "chinese-dark")


def test_labels_gradients_and_other_cells(labelled, visit):
    tape, path = labelled
    page = visit(path)
    assert page.inner_text("#title") == "a <title> & a </script>"
    at(page, 4, 0, 2)
    assert "step 4 “c”" in page.inner_text("#where")
    assert "c' = f·c + i·g" in page.inner_text("#equations")
    torch.testing.assert_close(numbers(page, "d c"), tape.gradient("c")[4, 0], atol=1e-3, rtol=1e-3)
    at(page, 4, 1, 2)
    assert "Layer 1, GRUCell" in page.inner_text("#where")
    page.select_option("#colour", "d h")
    shot(page, "labels")


class Own(fc.Cell):
    """A user's cell."""

    def step(self, x, state):
        (h,) = state
        gate = self.note("gate", torch.sigmoid(x))
        h = gate * h + (1 - gate) * torch.tanh(x)
        return h, (h,)


class Keeps(fc.Cell):
    """A cell whose state is its input."""

    def step(self, x, state):
        h = x + 0 * state[0]
        return h, (h,)


def test_a_users_cell_shows_its_step(tmp_path, visit):
    tape = fc.record(fc.Recurrent(Own(6, 6)), torch.randn(9, 1, 6))
    tape.save_html(tmp_path / "own.html")
    page = visit(tmp_path / "own.html")
    shown = page.inner_text("#equations")
    assert "gate = σ(x)" in shown
    assert 'gate = self.note("gate", torch.sigmoid(x))' in shown
    torch.testing.assert_close(numbers(page, "gate"), tape.value("gate")[0, 0], atol=1e-4, rtol=0)


def test_it_fits_a_phone_and_a_dark_room(large_path, visit):
    page = visit(large_path, color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_function("document.scrollingElement.scrollWidth <= 390", timeout=120_000)
    assert page.get_attribute("html", "data-theme") == "dark"
    shot(page, "phone")


def test_moving_on_a_long_tape_redraws_little(tmp_path, visit):
    """Moving reads and draws one step, redraws the overview, and no heatmap or chart."""
    steps, layers, size = 2000, 4, 256
    tape = fc.record(fc.GRU(3, size, num_layers=layers), torch.randn(steps, 1, 3))
    tape.save_html(tmp_path / "long.html")
    page = visit(tmp_path / "long.html")
    page.wait_for_selector("html[data-ready]", state="attached")
    counts = page.evaluate("""() => {
        const counts = { vectors: 0, boxes: 0, pictures: 0, charts: 0 };
        const counted = (name, call) => function (...given) { counts[name] += 1; return call.apply(this, given); };
        const brushes = CanvasRenderingContext2D.prototype;
        vector = counted("vectors", vector);
        brushes.fillRect = counted("boxes", brushes.fillRect);
        brushes.strokeRect = counted("boxes", brushes.strokeRect);
        brushes.putImageData = counted("pictures", brushes.putImageData);
        chart = counted("charts", chart);
        for (let i = 1; i <= 15; i++) go({ step: 100 * i });
        return counts;
    }""")
    shown = len(tape.names()) + 1
    assert 0 < counts["vectors"] <= 15 * 4 * shown
    assert 15 * layers * steps <= counts["boxes"] <= 15 * (layers * steps + shown * size + 1)
    assert counts["pictures"] == counts["charts"] == 0


def test_numbers_that_are_not_finite(tmp_path, visit):
    """The page of a network that explodes opens, shows NaN as such, and leads to the first."""
    x = torch.randn(20, 2, 3)
    x[5, 0, 1] = float("nan")
    tape = fc.record(fc.GRU(3, 4, num_layers=2, bidirectional=True), x)
    tape.save_html(tmp_path / "nan.html", rows=(0, 1))
    page = visit(tmp_path / "nan.html")
    page.wait_for_selector("html[data-ready]", state="attached")
    assert page.inner_text("#notFinite") == "first number that is not finite: layer 0, forward, r[0], step 5"
    page.click("#notFinite")
    assert page.input_value("#step") == "5"
    assert numbers(page, "h").isnan().all()
    page.evaluate("go({ step: 4 })")
    torch.testing.assert_close(numbers(page, "h"), tape.value("h", 0)[4, 0], atol=1e-4, rtol=0)
    page.select_option("#row", "1")
    assert page.locator("#notFinite").is_hidden()

    cell = fc.RNNCell(3, 6, nonlinearity="relu")
    with torch.no_grad():
        cell.weight_hh.fill_(40.0)
        cell.weight_ih.abs_()
    tape = fc.record(fc.Recurrent(cell), torch.rand(60, 1, 3))
    h = tape.value("h")[:, 0]
    first = int((~h.isfinite()).any(-1).nonzero()[0, 0])
    assert h[first].isinf().all()
    tape.save_html(tmp_path / "inf.html")
    page = visit(tmp_path / "inf.html")
    page.click("#notFinite")
    assert page.input_value("#step") == str(first)
    assert page.inner_text('details[data-name="h"] summary') == "h[0] = ∞"


@pytest.mark.parametrize("size", [1e-7, 1.0, 30.0, 1e9, 1e300])
def test_digits_are_as_many_as_are_true(size, tmp_path, visit):
    """Whatever the range, each printed number is the recorded one to within one of its last digit."""
    generator = torch.Generator().manual_seed(3)
    h = size * torch.randn(11, dtype=torch.float64, generator=generator) ** 3
    tape = fc.record(fc.Recurrent(Keeps(11, 11).double()), h.repeat(4, 1, 1))
    tape.save_html(tmp_path / "it.html")
    page = visit(tmp_path / "it.html")
    page.locator('details[data-name="h"] summary').click()
    texts = page.locator('details[data-name="h"] span').all_inner_texts()
    assert len(set(texts)) > 8
    for text, number in zip(texts, h.tolist(), strict=True):
        mantissa, _, exponent = text.strip().partition("e")
        last_digit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        if text.strip() == "0":
            last_digit = (h.max() - h.min()).item() / 65532
        assert abs(float(text) - number) <= last_digit, text


def test_errors(large, tmp_path):
    with pytest.raises(IndexError, match=r"has 3 row\(s\), got row 3"):
        large.save_html(tmp_path / "it.html", rows=(3,))
    with pytest.raises(ValueError, match="a row at least"):
        large.save_html(tmp_path / "it.html", rows=())


def test_a_hostile_tape_runs_nothing(tmp_path, visit):
    fc.record(fc.LSTM(5, 9), torch.randn(7, 3, 5), labels="abcdefg").save(tmp_path / "it")
    fc.Tape.load(changed(tmp_path / "it", tmp_path / "other", poisoned)).save_html(tmp_path / "it.html")
    page = visit(tmp_path / "it.html")
    at(page, 1, 0, 1)
    assert "<img src=x onerror=" in page.inner_text("#equations")
    assert page.evaluate("window.harmed") is None
