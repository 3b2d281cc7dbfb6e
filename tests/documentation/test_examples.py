"""The examples, with fewer steps than they take by themselves, held to their baselines."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest

from tests.paths import ROOT

EXAMPLES = ROOT / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_recurrent_ppo_learns_to_remember():
    """Without memory one answer in four is right."""
    assert load("recurrent_ppo").train(40, quiet=True) > 0.9


def test_forecasting_beats_its_baselines():
    errors = load("forecasting").train(300, quiet=True)
    assert errors["the last year again"] == pytest.approx(21.7, abs=0.05)
    assert errors["fusecell GRU"] < 0.95 * min(errors["the last year again"], errors["11 years ago"])


def test_live_pitch_hears_better_than_the_strongest_frequency(tmp_path):
    example = load("live_pitch")
    scores = example.report(example.train(0, updates=120, quiet=True), tmp_path / "voices.wav")
    assert scores["within half a semitone"] > max(0.5, scores["the strongest frequency"] + 0.1)
    assert scores["real-time factor"] > 0


def test_look_inside_writes_a_page(tmp_path):
    example = load("look_inside")
    tape = example.record(example.train(0, updates=5), "def add(self):")
    assert tape.kinds == ("GRUCell", "GRUCell")
    assert tape.gradient("z", 1).abs().sum() > 0
    tape.save_html(tmp_path / "page.html")
    assert "def step" in (tmp_path / "page.html").read_text(encoding="utf-8")
