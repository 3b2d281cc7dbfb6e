"""The benchmarks measure what they say: every contestant's numbers first, then the arithmetic on the times."""

import copy
import json
import platform
import shutil
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

import fusecell as fc
from benchmarks import from_c, limits, overhead, overview, plot, report
from benchmarks.clock import Timing, take_turns
from benchmarks.measure import Row, measure
from benchmarks.peers import EAGER, PEERS, TORCH, Peer, installed
from benchmarks.problem import make_problem
from benchmarks.shapes import QUICK, SHAPES, STEPS, USERS, Mode, Shape, pick
from tests.paths import ROOT

TINY = Shape("gru", 7, 3, 5, 10)


def row(mode=Mode.INFERENCE, **medians):
    return Row(
        Shape("gru", 10, 1, 2, 3), mode, {name: Timing(median, median, 5, 1) for name, median in medians.items()}, {}
    )


def test_a_run_prints_and_writes_its_figures(tmp_path):
    written = tmp_path / "deep" / "run.json"
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--only", "lstm", "--peers", "torch.nn"]
    command += ["--mode", "training", "--mode", "inference"]
    process = subprocess.run(
        [*command, "--seconds", "0", "--json", str(written)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    figures = json.loads(written.read_text(encoding="utf-8"))
    assert len(figures["machine"]["bound_to"]) == figures["threads"] == 1
    assert figures["versions"]["torch"] == torch.__version__
    assert "--quick" in figures["command"]
    assert figures["revision"]
    inference, training = figures["shapes"]
    assert [inference["mode"], training["mode"]] == ["inference", "training"]
    times = inference["us_per_step"]
    assert set(times) == {"fusecell", "torch.nn"}
    assert inference["ratio_to_best_peer"] == pytest.approx(times["torch.nn"] / times["fusecell"])
    assert figures["geometric_mean_ratio"]["inference"] == pytest.approx(inference["ratio_to_best_peer"])
    assert set(training["us_per_step"]) == {"fusecell", "torch.nn"}
    for shape in figures["shapes"]:
        assert max(shape["max_error"].values()) < 1e-6
        assert shape["core_share"] > 0
    assert "Inference, 1 thread(s)" in process.stdout
    assert "Training: forward and backward, 1 thread(s)" in process.stdout


def test_the_chart_marks_every_peer_once_per_shape(tmp_path, monkeypatch):
    rows = [row(fusecell=2e-4, fast=1e-4, slow=8e-4), row(fusecell=2e-4, fast=4e-4)]
    # Where ours was not compiled there is nothing to compare with, and no mark.
    rows += [row(Mode.TRAINING, fusecell=2e-4, fast=16e-4), row(Mode.TRAINING, fast=1.0)]
    run = report.as_json(rows, {"threads": 1, "machine": {"cpu": "a CPU"}})
    drawn = {}
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, mark, label, **style: drawn.update({(self.get_title("left"), label): (x, y)})
    )
    monkeypatch.setattr(Axes, "legend", lambda self, **style: None)
    plot.draw(run, tmp_path / "chart.png")
    assert drawn == {
        ("Inference", "fast"): (pytest.approx((2.0, 0.5)), (0, 1)),
        ("Inference", "slow"): (pytest.approx((4.0,)), (1,)),
        (Mode.TRAINING.title, "fast"): (pytest.approx((8.0,)), (1,)),
    }
    assert (tmp_path / "chart.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "options",
    [["--only", "no such shape"], ["--peers", "nobody"], ["--threads", "100000"], ["--mode", "none"]],
)
def test_an_option_that_fits_nothing_says_so(options):
    command = [sys.executable, "-m", "benchmarks.run", "--quick", *options]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode in (1, 2)
    assert options[0] in process.stderr
    assert "Traceback" not in process.stderr


CASES = [
    *((shape, mode) for mode in (Mode.INFERENCE, Mode.TRAINING) for shape in (*QUICK, TINY)),
    *((shape, mode) for mode in (Mode.STEP, Mode.STEP_TRAINING) for shape in (*STEPS, Shape("rnn_tanh", 1, 3, 5, 7))),
]


def solve(problem):
    """Return the float32 results of torch's layer, or of the Python loop for a cell that torch lacks."""
    peer = TORCH if problem.in_torch else EAGER
    return peer.arrays(problem, peer.build(problem, 1)())


@pytest.mark.parametrize(("shape", "mode"), CASES, ids=str)
def test_the_answer_is_torchs_own(shape, mode):
    problem = make_problem(shape, mode)
    arrays = solve(problem)
    assert arrays.keys() == problem.answer.keys()
    for name, value in arrays.items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, problem.answer[name], rtol=0, atol=2e-6 * max(1, np.abs(value).max()))


@pytest.mark.parametrize(("shape", "mode"), [case for case in CASES if case[1].training], ids=str)
def test_the_gradients_are_the_slope_of_the_loss(shape, mode):
    problem = make_problem(shape, mode)
    layer = copy.deepcopy(problem.layer).double()
    parameters = list(layer.parameters())
    torch.manual_seed(1)
    direction = [torch.randn_like(value) for value in parameters]

    def loss(distance):
        shifted = [value + distance * way for value, way in zip(parameters, direction, strict=True)]
        named = dict(zip(dict(layer.named_parameters()), shifted, strict=True))
        with torch.no_grad(), fc.runner("eager"):
            returned = torch.func.functional_call(layer, named, tuple(value.double() for value in problem.inputs))
        y = returned if mode.single else returned[0]
        return float((y * problem.weight.double()).sum())

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    gradients = [torch.from_numpy(value) for value in problem.answer.values()]
    expected = sum(float((way * value).sum()) for way, value in zip(direction, gradients, strict=True))
    assert slope == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mode", [Mode.TRAINING, Mode.STEP, Mode.STEP_TRAINING])
def test_onnx_neither_trains_nor_steps(mode):
    problem = make_problem(STEPS[0] if mode.single else TINY, mode)
    having = {peer.name for peer in PEERS if installed(peer) and "onnx" in peer.packages and peer.build(problem, 1)}
    assert having == set()


def altered(change):
    def arrays(problem, returned):
        return {name: change(value) for name, value in problem.answer.items()}

    return Peer("wrong", (), lambda problem, threads: lambda: None, arrays)


@pytest.mark.parametrize("change", [lambda value: value + 1e-3, lambda value: value * np.nan], ids=["off", "nan"])
def test_a_contestant_with_other_numbers_is_not_timed(change):
    with pytest.raises(ArithmeticError, match=r"wrong on gru 7/3/5/10: y is off by (0\.001|nan)"):
        measure(TINY, Mode.INFERENCE, (altered(change),), threads=1, seconds=0.01)


def test_gradients_are_compared_by_their_own_size():
    measure(TINY, Mode.TRAINING, (altered(lambda value: value * (1 + 4e-5)),), threads=1, seconds=0.0)
    with pytest.raises(ArithmeticError, match=r"wrong on gru 7/3/5/10: weight_ih is off by 6e-05"):
        measure(TINY, Mode.TRAINING, (altered(lambda value: value * (1 + 6e-5)),), threads=1, seconds=0.0)


def test_a_contestant_that_leaves_a_gradient_out_is_not_timed():
    peer = Peer("lazy", (), lambda problem, threads: lambda: None, lambda problem, returned: {})
    with pytest.raises(ArithmeticError, match=r"lazy on gru 7/3/5/10: gave \[\], expected \['bias_hh'"):
        measure(TINY, Mode.TRAINING, (peer,), threads=1, seconds=0.0)


def test_contestants_take_turns():
    seen = []
    timings = take_turns({name: lambda name=name: seen.append(name) for name in "ab"}, seconds=0.0)
    assert {timing.turns for timing in timings.values()} == {5}
    last = "".join(seen)[-timings["a"].calls - timings["b"].calls - 2 :]
    assert last == "a" * (timings["a"].calls + 1) + "b" * (timings["b"].calls + 1)


def test_ratios_are_to_the_fastest_peer():
    result = row(fusecell=2e-4, slow=9e-4, fast=3e-4)
    assert result.best_peer() == "fast"
    assert result.ratio() == pytest.approx(1.5)
    assert result.microseconds("slow") == pytest.approx(90)
    assert result.microseconds("absent") is None
    assert row(fusecell=1.0).ratio() is None
    assert report.geometric_mean([result, row(fusecell=1.0, fast=6.0), row(fast=1.0)]) == pytest.approx(3.0)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the levels are x86-64's")
def test_all_are_held_to_a_level(tmp_path):
    """What torch runs can be asked in the same process; of the rest the figures say what was asked for."""
    written, level = tmp_path / "run.json", "x86-64-v2"
    program = (
        "from benchmarks.run import main\n"
        f"main(['--quick', '--only', 'lstm', '--peers', 'torch.nn', '--mode', 'inference', '--seconds', '0', "
        f"'--level', {level!r}, '--json', {str(written)!r}])\n"
        "import torch, fusecell as fc\n"
        "print(torch.backends.cpu.get_cpu_capability(), fc.show_config().target)"
    )
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1].startswith(f"DEFAULT {level}")
    assert f"held to {level}" in process.stdout
    assert json.loads(written.read_text(encoding="utf-8"))["level"] == level


def test_a_peer_that_cannot_be_held_is_marked():
    text = report.as_markdown([row(fusecell=4e-4, fast=1e-4)], unheld=["fast"])
    assert text.splitlines()[0] == "| cell T/N/I/H | fusecell | fast* | to best peer |"


def test_the_page_shows_losses_too():
    text = report.as_markdown([row(fusecell=4e-4, fast=1e-4)])
    assert text.splitlines()[-1] == "| gru 10/1/2/3 | 40 | 10 | 0.25x |"


def test_shapes_are_picked_by_name():
    assert pick(Mode.TRAINING) == SHAPES
    assert pick(Mode.STEP) == STEPS
    assert {shape.cell for shape in pick(Mode.INFERENCE, quick=True)} == {shape.cell for shape in SHAPES}
    assert [shape.cell for shape in pick(Mode.TRAINING, "lstm")] == ["lstm", "lstm"]


def test_overhead_is_what_kernels_leave_of_a_call():
    timed = overhead.calls()
    assert len(timed) == 9
    for name in ("a step, fusecell", "a layer that learns, fusecell"):
        assert all(0 < inside < whole for whole, inside in overhead.inside_kernels(timed[name], least=3))
        assert overhead.above_kernels(timed[name], seconds=0.0)[1] > 0
    assert {inside for _, inside in overhead.inside_kernels(timed["a step, torch.nn"], least=3)} == {0.0}


def test_limits_of_a_kernel():
    """Check the arithmetic on the times, for a built-in cell and for a user's cell."""
    flops, l2 = limits.machine_limits(seconds=0.0)
    assert min(flops, l2) > 0
    for cell in ("gru", limits.OWN):
        bound = limits.bound(Shape(cell, 20, 24, 70, 130), flops, l2, seconds=0.0)
        assert min(bound.epilogue, bound.kernel) > 0
        assert bound.rate == pytest.approx(2e-3 * bound.macs * 24 / bound.kernel)
    assert bound.macs == 70 * 2 * 130 + 3 * 130 * 130
    learns = limits.trained(Shape("gru", 20, 24, 70, 130), flops, seconds=0.0)
    # A GRU's products once forward, and again for the gradients of the weights and of the state.
    assert learns.multiply_adds == pytest.approx(2e6 * 24 * 3 * 130 * (2 * 70 + 3 * 130) / flops)
    assert 0 < learns.kernels < learns.call


def test_a_kernel_without_products_calls_no_microkernel():
    from fusecell.compiler.dispatch.runner import find_program

    text = find_program(fc.GRUCell(7, 13), (torch.randn(5, 3, 7),)).kernel.emitted.text
    bare = limits.without_products(text)
    assert "call void %microkernel" in text
    assert "call void %microkernel" not in bare
    assert len(text.splitlines()) - len(bare.splitlines()) == text.count("call void %microkernel")


def test_the_overview_has_each_shape_once_and_every_run(tmp_path):
    shapes = [shape for of_user in USERS.values() for shape in of_user]
    assert sorted(shapes, key=SHAPES.index) == list(SHAPES)
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "results").glob("*-core*.json"))]
    for run in runs:
        for mode in (Mode.INFERENCE, Mode.TRAINING):
            every = [ratio for of_user in overview.ratios(run, mode).values() for ratio in of_user]
            assert statistics.geometric_mean(every) == pytest.approx(run["geometric_mean_ratio"][mode.value])
    overview.draw(runs, tmp_path / "overview.svg")
    assert (tmp_path / "overview.svg").stat().st_size > 10_000


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_steps_from_c_have_the_numbers_of_onnx_runtimes(cell):
    """Which the program compares: another entry of the table of functions, or another layout, would not give them."""
    pytest.importorskip("onnxruntime")
    ours, peers = from_c.time_shape(Shape(cell, 1, 1, 5, 11), "float32", 3)
    assert 0 < ours < 1e6
    assert 0 < peers < 1e6
