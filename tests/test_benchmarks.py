"""The benchmarks measure what they say: every contestant's numbers first, then the arithmetic on the times."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from benchmarks import plot, report
from benchmarks.clock import Timing, take_turns
from benchmarks.measure import Row, measure
from benchmarks.peers import EAGER, TORCH, Peer
from benchmarks.problem import make_problem
from benchmarks.shapes import QUICK, SHAPES, Shape, pick

ROOT = Path(__file__).parent.parent
TINY = Shape("gru", 7, 3, 5, 10)


def row(**medians):
    return Row(Shape("gru", 10, 1, 2, 3), {name: Timing(median, median, 5, 1) for name, median in medians.items()}, {})


def test_a_run_prints_and_writes_its_figures(tmp_path):
    written = tmp_path / "deep" / "run.json"
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--only", "lstm", "--peers", "torch.nn"]
    done = subprocess.run(
        [*command, "--seconds", "0.05", "--json", str(written)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(written.read_text(encoding="utf-8"))
    assert len(found["machine"]["bound_to"]) == found["threads"] == 1
    assert found["versions"]["torch"] == torch.__version__
    assert "--quick" in found["command"]
    assert found["revision"]
    (shape,) = found["shapes"]
    times = shape["us_per_step"]
    assert set(times) == {"fusecell", "torch.nn"}
    assert shape["ratio_to_best_peer"] == pytest.approx(times["torch.nn"] / times["fusecell"])
    assert max(shape["max_abs_error"].values()) < 1e-6
    assert 0 < shape["core_share"] < 1.5
    assert "torch.nn" in done.stdout


def test_the_chart_marks_every_peer_once_per_shape(tmp_path, monkeypatch):
    rows = [row(fusecell=2e-4, fast=1e-4, slow=8e-4), row(fusecell=2e-4, fast=4e-4)]
    run = report.as_json(rows, {"threads": 1, "machine": {"cpu": "a CPU"}})
    drawn = {}
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, mark, label, **style: drawn.update({label: (x, y)}))
    monkeypatch.setattr(Axes, "legend", lambda self, **style: None)
    plot.draw(run, tmp_path / "chart.png")
    assert drawn["fast"] == (pytest.approx((2.0, 0.5)), (0, 1))
    assert drawn["slow"] == (pytest.approx((4.0,)), (1,))
    assert (tmp_path / "chart.png").stat().st_size > 1000


@pytest.mark.parametrize("options", [["--only", "no such shape"], ["--peers", "nobody"], ["--threads", "100000"]])
def test_an_option_that_fits_nothing_says_so(options):
    command = [sys.executable, "-m", "benchmarks.run", "--quick", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert options[0] in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("shape", [*QUICK, TINY], ids=lambda shape: shape.name)
def test_the_answer_is_torchs_own(shape):
    problem = make_problem(shape)
    peer = TORCH if problem.in_torch else EAGER
    found = peer.outputs(peer.build(problem, 1)())
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, problem.answer, rtol=0, atol=2e-6)


def test_a_contestant_with_other_numbers_is_not_timed():
    wrong = Peer("wrong", (), lambda problem, threads: lambda: problem.answer + 1e-3, lambda returned: returned)
    with pytest.raises(ArithmeticError, match=r"wrong on gru 7/3/5/10: off by 0\.001"):
        measure(TINY, (wrong,), threads=1, seconds=0.01)


def test_a_contestant_with_nan_is_not_timed():
    broken = Peer("broken", (), lambda problem, threads: lambda: problem.answer * np.nan, lambda returned: returned)
    with pytest.raises(ArithmeticError, match="broken"):
        measure(TINY, (broken,), threads=1, seconds=0.01)


def test_contestants_take_turns():
    seen = []
    timings = take_turns({name: lambda name=name: seen.append(name) for name in "ab"}, seconds=0.0)
    assert {timing.turns for timing in timings.values()} == {5}
    last = "".join(seen)[-timings["a"].calls - timings["b"].calls - 2 :]
    assert last == "a" * (timings["a"].calls + 1) + "b" * (timings["b"].calls + 1)


def test_ratios_are_to_the_fastest_peer():
    found = row(fusecell=2e-4, slow=9e-4, fast=3e-4)
    assert found.best_peer() == "fast"
    assert found.ratio() == pytest.approx(1.5)
    assert found.microseconds("slow") == pytest.approx(90)
    assert found.microseconds("absent") is None
    assert row(fusecell=1.0).ratio() is None
    assert report.geometric_mean([found, row(fusecell=1.0, fast=6.0), row(fast=1.0)]) == pytest.approx(3.0)


def test_the_page_shows_losses_too():
    text = report.as_markdown([row(fusecell=4e-4, fast=1e-4)])
    assert text.splitlines()[-1] == "| gru 10/1/2/3 | 40 | 10 | 0.25x |"


def test_shapes_are_picked_by_name():
    assert pick() == SHAPES
    assert {shape.cell for shape in pick(quick=True)} == {shape.cell for shape in SHAPES}
    assert [shape.cell for shape in pick("lstm")] == ["lstm", "lstm"]
