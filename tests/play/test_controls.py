"""The page's controls: by pointer and by keyboard, in both languages, on a phone, and of one small file."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fusecell.play import KINDS
from tests.play.page_tools import TEXT, layer_of, near, read_text, shot, shown

pytestmark = pytest.mark.pages


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


STORIES = {"frozen": ("its memory freezes", "记忆就此冻结"), "carousel": ("error carousel", "误差传送带")}


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
    tab.evaluate("app.experiment('frozen').then(app.measure)")
    h = shown(tab, "h", pane=1)
    near(h[30:], h[29].expand(len(h) - 30, -1))
    steps = len(h) - 30
    near(torch.tensor(tab.evaluate("app.measured[1]"))[: steps + 1], torch.ones(steps + 1))
    assert "B，GRU" in tab.locator("#lengths li").nth(1).inner_text()
    shot(tab, "play-zh")


def test_what_was_chosen_last_is_shown(visit):
    """Choosing again while cells are still compiling leaves no trace of the first choice."""
    tab = visit()
    chosen = "[app.task, ...app.panes.map((pane) => pane.cell.model.task + '/' + pane.kind)]"
    ended = tab.evaluate(
        "Promise.all([app.experiment('forget'), app.choose('text', ['lstm', 'gru']), app.choose('curve')])"
    )
    assert ended[1:] == [False, True]
    assert tab.evaluate(chosen) == ["curve", "curve/gru", "curve/rnn_tanh"]
    tab.evaluate("Promise.all(Object.keys(EXPERIMENTS).map(app.experiment))")
    assert tab.evaluate(chosen) == ["text", "text/lstm", "text/rnn_tanh"]


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
        tab.evaluate(f"app.choose('{task}', ['lstm', 'gru_reset_before'])")
        tab.check("#compare")
        assert tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
        shot(tab, f"play-phone-{task}")
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.click("#theme")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != dark
