"""The examples, with fewer steps than they take by themselves, held to their baselines."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from types import ModuleType

import numpy as np
import pytest

from tests.integrations.packages import missing
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
    assert "Wr x + Ur h" in (tmp_path / "page.html").read_text(encoding="utf-8")


def need(*tools):
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}: apt-get install it")


def test_a_filter_in_cpp_has_the_samples_of_its_stream(tmp_path):
    need("c++", "ar")
    error, same = load("export_models").filter_example(tmp_path, 0, updates=60)
    assert same
    assert error < 0.05


def test_a_filter_in_rust_has_the_bits_of_its_stream(tmp_path):
    need("rustc", "ar")
    assert load("export_models").rust_example(tmp_path, 0, updates=20)


def test_a_ladspa_plugin_has_the_samples_of_its_stream(tmp_path):
    """Run by the host of LADSPA's own SDK."""
    need("cc", "ar", "applyplugin")
    assert load("export_models").plugin_example(tmp_path, 0, updates=20)


def test_a_gru_on_a_bare_microcontroller_has_the_bits_of_its_stream(tmp_path):
    """And takes less than 4 kB of memory, stack included."""
    need("arm-none-eabi-gcc", "qemu-system-arm")
    result = load("export_models").microcontroller_example(tmp_path)
    assert result["status"] == 0
    assert result["hash"] == result["expected"]
    assert result["stream"] + result["stack"] < 4096


@pytest.mark.pages
def test_the_page_hears_pitch(browser, tmp_path):
    example = load("export_models")
    page_path = example.build_page(tmp_path, 0, updates=60)
    with example.serve(tmp_path, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page()
        messages = []
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto(f"http://localhost:{server.server_port}/{page_path.name}")
        near = page.evaluate("sing(false, 2)")
        assert "% of the blocks" in page.locator("#score").inner_text()
        page.close()
        server.shutdown()
    assert messages == []
    assert near > 0.1  # by chance it would be one block in 36


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_learns(strategy):
    """Of the same batches, each has a half, and the losses are those of one process with all."""

    def loss(*launcher):
        script = (str(EXAMPLES / "train_distributed.py"), "--updates", "4", "--hidden", "20", "--strategy", strategy)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        done = subprocess.run(
            [sys.executable, *launcher, *script], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return re.search(r"loss ([\d.]+)", done.stdout)[1]

    assert loss("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2") == loss()


def test_scores_of_many_sequences_are_the_errors_of_the_model(tmp_path):
    """Of lengths in any order, in a batch of fewer rows than the stream has."""
    import torch

    import fusecell as fc

    example = load("score_with_ray")
    torch.manual_seed(0)
    untrained = fc.Sequential(fc.GRU(1, 24), torch.nn.Linear(24, 1))
    fc.Stream(untrained, example.ROWS).save(tmp_path / "untrained.fusecell")
    sequences, _ = example.heartbeats(5, seed=3)
    batch = {"id": np.arange(5), "values": np.array(sequences, dtype=object)}
    scores = example.score(batch, str(tmp_path / "untrained.fusecell"))["score"]
    for values, score in zip(sequences, scores, strict=True):
        x = torch.from_numpy(values)[:, None, None]
        with torch.no_grad():
            expected = (untrained(x[:-1])[0] - x[1:]).square().mean()
        assert score == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.packages
def test_ray_scores_files_of_sequences():
    if missing("ray") or missing("pyarrow"):
        pytest.skip(missing("ray") or missing("pyarrow"))
    script = (sys.executable, str(EXAMPLES / "score_with_ray.py"), "--sequences", "300", "--cpus", "2")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(script, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(re.search(r"area under the curve ([\d.]+)", done.stdout)[1]) > 0.9
