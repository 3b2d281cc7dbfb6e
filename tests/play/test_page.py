"""The page of cells to play with, in Debian's chromium, without a network: its numbers are those of torch.nn."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from fusecell.play import KINDS, page, train_models
from fusecell.play.models import ALPHABET, TASKS, encode
from tests.paths import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARTEFACTS = ROOT / "test-artefacts"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
TEXT = "the cat sat, on the mat"
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
    steps = f"app.panes[{pane}].run.outputs.map((_, t) => [...app.panes[{pane}].cell.value(app.panes[{pane}].run, '{name}', t)])"
    return torch.tensor(tab.evaluate(steps))


def layer_of(model) -> nn.Module:
    """Return torch.nn's layer with a model's weights."""
    layer = TORCHS[model.kind](model.cell.cell.input_size, model.cell.hidden_size)
    layer.load_state_dict({f"{name}_l0": value for name, value in model.cell.cell.state_dict().items()})
    return layer


def near(values, expected):
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)


def settled(tab):
    """Wait until gradients are measured after a change."""
    tab.wait_for_timeout(250)


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
        scores = torch.tensor(
            tab.evaluate(
                "app.panes[0].run.outputs.map((_, t) => [...app.panes[0].cell.prediction(app.panes[0].run, t)])"
            )
        )
        near(scores, model.cell.readout(expected))
        tab.check("[name=task][value=curve]")
        tab.wait_for_function("app.panes[0].cell.model.task === 'curve' && app.panes[0].run.inputs.length === 70")
        curve = torch.tensor(tab.evaluate("[...app.curve]"))[:, None]
        near(shown(tab, "h"), layer_of(models["curve", kind])(curve)[0])
