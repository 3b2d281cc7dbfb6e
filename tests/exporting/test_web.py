"""Modules for web pages, in Node.js and in Debian's chromium."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import subprocess
import threading
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import fusecell as fc
from fusecell.exporting.reference import reference_numbers
from tests.exporting.models import EveryFunction
from tests.exporting.test_targets import verified

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js: apt-get install nodejs")


@needs_node
def test_the_es_module_has_the_bits_of_the_stream(tmp_path):
    """Step, push, states and reset, against a stream without fused multiply-adds."""
    stream = fc.Stream(fc.LSTM(3, 5))
    verified(fc.export(stream, tmp_path / "lstm", format="web", verify=True))
    numbers = reference_numbers(stream.parts, 1, fused=False)
    (tmp_path / "run.mjs").write_text(
        'import { readFileSync } from "node:fs";\nimport { Stream, stateSize } from "./lstm.mjs";\n'
        f"const x = Float32Array.from({json.dumps(numbers.inputs.ravel().tolist())});\n"
        'const stream = await Stream.create(readFileSync(new URL("lstm.wasm", import.meta.url)));\n'
        "const first = stream.step(x.slice(0, 3)), before = stream.state, rest = stream.push(x.slice(3));\n"
        "const last = stream.state;\nstream.state = before;\nconst again = stream.push(x.slice(3));\nstream.reset();\n"
        "let message; try { stream.step([1]); } catch (error) { message = error.message; }\n"
        "console.log(JSON.stringify({ stateSize, message, outputs: [...first, ...rest], again: [...again],\n"
        "  state: [...last], reset: [...stream.step(x.slice(0, 3))] }));\n"
    )
    done = subprocess.run(["node", tmp_path / "run.mjs"], check=True, capture_output=True, text=True)
    result = json.loads(done.stdout)
    assert (np.float32(result["outputs"]) == numbers.outputs.ravel()).all()
    assert result["again"] == result["outputs"][5:]
    assert result["reset"] == result["outputs"][:5]
    assert (np.float32(result["state"]) == numbers.state).all()
    assert result["stateSize"] == 10
    assert result["message"] == "input has 1 numbers, expected 3"


@needs_node
def test_functions_of_math_are_imported(tmp_path):
    """float32 calls JavaScript's sine for huge arguments alone; here there are none."""
    report = fc.export(fc.Recurrent(EveryFunction()), tmp_path / "cell", format="web", verify=True)
    assert report.external == ("cos", "sin")
    (tmp_path / "run.mjs").write_text(
        'import { readFileSync } from "node:fs";\nimport { Stream } from "./cell.mjs";\n'
        'console.log(JSON.stringify([...new Stream(readFileSync(new URL("cell.wasm", import.meta.url)))'
        ".step(new Float32Array([1, 2, 3, 4, 5]))]));\n"
    )
    done = subprocess.run(["node", tmp_path / "run.mjs"], check=True, capture_output=True, text=True)
    torch.manual_seed(0)
    assert np.isfinite(json.loads(done.stdout)).all()


class _Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map: ClassVar = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

    def log_message(self, *arguments):
        pass


@pytest.fixture
def served(tmp_path):
    """Serve the test's folder, as worklets load from a server alone; return its address."""
    with http.server.ThreadingHTTPServer(("localhost", 0), functools.partial(_Handler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()


RENDERED = """async ([samples, options]) => {
  const context = new OfflineAudioContext(1, samples.length, 48000), posted = [];
  await context.audioWorklet.addModule("./filter-processor.mjs");
  const bytes = await (await fetch("./filter.wasm")).arrayBuffer();
  const node = new AudioWorkletNode(context, "filter", { processorOptions: { bytes, ...options } });
  node.port.onmessage = ({ data }) => posted.push([...data]);
  const source = new AudioBufferSourceNode(context);
  source.buffer = new AudioBuffer({ length: samples.length, sampleRate: 48000 });
  source.buffer.copyToChannel(Float32Array.from(samples), 0);
  source.connect(node).connect(context.destination);
  source.start();
  const played = [...(await context.startRendering()).getChannelData(0)];
  const pause = () => new Promise((go) => setTimeout(go, 20));
  for (let wait = 0; wait < 100 && posted.length < options.frames; wait++) await pause();
  return { played, posted };
}"""


def rendered(browser, served, folder, stream, x, **options):
    """Return what a worklet plays and posts for a sound."""
    fc.export(stream, folder / "filter", format="web")
    (folder / "index.html").write_text("<!doctype html><title>filter</title>")
    page = browser.new_page()
    messages = []
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.goto(f"{served}/index.html")
    result = page.evaluate(RENDERED, [x.tolist(), options])
    page.close()
    assert messages == []
    return result


@pytest.mark.pages
def test_an_audio_worklet_filters_a_sound(browser, served, tmp_path):
    """A recurrent filter over 512 samples of an offline context, sample by sample."""
    layer = fc.Sequential(fc.Recurrent(fc.GRUCell(1, 7)), nn.Linear(7, 1))
    stream = fc.Stream(layer)
    x = np.random.default_rng(0).standard_normal(512).astype(np.float32)
    played = rendered(browser, served, tmp_path, stream, x)["played"]
    # Multiply-adds round twice there: the last bits differ.
    np.testing.assert_allclose(played, stream.push(x[:, None])[:, 0], atol=1e-5)


@pytest.mark.pages
def test_an_audio_worklet_takes_frames(browser, served, tmp_path):
    """A step for each 48 samples, which divide no block of a browser: outputs are posted, or played a frame late."""
    x = np.random.default_rng(0).standard_normal(512).astype(np.float32)
    frames = x[:480].reshape(10, 48)
    posting = fc.Stream(fc.GRU(48, 7))
    posted = rendered(browser, served, tmp_path, posting, x, mode="frames", frames=10)["posted"]
    np.testing.assert_allclose(posted, posting.push(frames), atol=1e-5)
    playing = fc.Stream(fc.GRU(48, 48))
    played = rendered(browser, served, tmp_path, playing, x, mode="frames")["played"]
    np.testing.assert_allclose(played[48:], playing.push(frames).ravel()[: 512 - 48], atol=1e-5)
    assert not any(played[:48])
