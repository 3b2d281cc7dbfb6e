"""What the tests of the page share: torch.nn's layers of its models, its values, and a hand on its controls."""

from __future__ import annotations

import torch
from torch import nn

from tests.paths import ROOT

__all__ = ["TEXT", "TORCHS", "drag", "layer_of", "near", "read_text", "row", "shot", "shown"]

ARTEFACTS = ROOT / "test-artefacts"
TEXT = "the cat sat, on the mat"
TORCHS = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn_tanh": nn.RNN}


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


def row(tab, name, pane=0):
    return tab.locator(".pane").nth(pane).locator(f'.value[data-name="{name}"]')


def read_text(tab, *kinds, text=TEXT):
    """Let the cells read a text."""
    tab.evaluate(
        "([text, kinds]) => { app.text = text; return app.choose('text', kinds, { anew: true }); }", [text, list(kinds)]
    )


def drag(tab, bars, unit, height, units=32):
    """Pull a bar to a height between 0, the lower edge, and 1."""
    bars.scroll_into_view_if_needed()
    box = bars.bounding_box()
    x = box["x"] + (unit + 0.5) * box["width"] / units
    tab.mouse.move(x, box["y"] + box["height"] / 2)
    tab.mouse.down()
    tab.mouse.move(x, box["y"] + (1 - height) * box["height"], steps=3)
    tab.mouse.up()
