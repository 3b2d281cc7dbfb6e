"""The command line."""

import subprocess
import sys

import pytest
from torch import nn
from typer.testing import CliRunner

import fusecell as fc
from fusecell.cli.commands import app


def build():
    """Build a layer, as a factory for `fusecell summary`."""
    return fc.Sequential(fc.Recurrent(fc.GRUCell(3, 4)), nn.Linear(4, 2))


def not_a_module():
    return 3


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "120"})
    assert result.exit_code == code, result.output
    # Boxes and line ends depend on the terminal's width; words don't.
    return " ".join(result.output.replace("│", " ").split())


def test_version():
    assert run("--version") == f"fusecell {fc.__version__}"


def test_count():
    assert "= 140 cell calls by 4 distinct" in run("count", "--seq-len", 35, "--layers", 2, "--bidirectional")
    assert "= 35 cell calls by 1 distinct" in run("count", "--seq-len", 35)


def test_play_writes_a_page(tmp_path):
    said = run("play", tmp_path / "play.html", "--updates", 0, "--cell", "mgu", "--cell", "ugrnn")
    assert "open it in a browser, it needs no network" in said
    assert "<title>fusecell</title>" in (tmp_path / "play.html").read_text(encoding="utf-8")
    assert "There is no cell 'no'" in run("play", tmp_path / "play.html", "--cell", "no", code=2)


def test_cells_lists_the_zoo():
    shown = run("cells")
    for member in fc.CELLS:
        assert member.name in shown
        assert all(word in shown for word in member.equation.split())


@pytest.mark.parametrize("name", ["gru", "GRU", "GRUCell", "gru_reset_before"])
def test_summary_of_a_cell(name):
    shown = run("summary", "--cell", name, "--input-size", 5, "--hidden-size", 10, "--seq-len", 7, "--batch-size", 3)
    assert "T=7 N=3 total 510 9,450 7" in shown


def test_summary_of_a_factory():
    shown = run("summary", f"{__name__}:build", "--seq-len", 7)
    assert f"total 118 {7 * (3 * 4 * 7 + 8)} 7" in shown


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "give either MODULE:FACTORY or --cell NAME"),
        (["--cell", "gru", "a:b"], "give either MODULE:FACTORY or --cell NAME"),
        (["--cell", "grue"], "no cell is called 'grue'; there are: rnn_tanh"),
        (["nowhere"], "not of the form MODULE:FACTORY"),
        (["no.such.module:build"], "No module named"),
        ([f"{__name__}:missing"], "has no attribute 'missing'"),
        ([f"{__name__}:not_a_module"], "gave int, expected a torch.nn.Module"),
        (["torch.nn:Identity"], "got Identity"),
    ],
)
def test_summary_says_what_is_wrong(arguments, text):
    assert text in run("summary", *arguments, code=2)


def test_explain_a_cell_and_a_factory():
    assert "GRUCell(5, 10) compiled" in run("explain", "--cell", "gru", "--input-size", 5, "--hidden-size", 10)
    assert "GRUCell(3, 4) compiled" in run("explain", f"{__name__}:build")
    assert "give either MODULE:FACTORY or --cell NAME" in run("explain", code=2)


@pytest.mark.parametrize(
    ("stage", "text"),
    [
        ("graph", "current = add(current.input, current.hidden)"),
        ("passes", "-- gather_affines"),
        ("plan", "store current.input in value.current.input[0:] by chunk"),
        ("llvm", "define internal void @loop0.4("),
        ("asm", "run:"),
    ],
)
def test_explain_shows_a_stage(stage, text):
    shown = run("explain", "--cell", "leaky", "--input-size", 3, "--hidden-size", 4, "--stage", stage)
    assert "LeakyCell(3, 4) ====" in shown
    assert text in shown


def test_explain_shows_a_stage_with_gradients_and_of_every_cell():
    shown = run("explain", f"{__name__}:build", "--stage", "plan", "--gradients")
    assert "GRUCell(3, 4), forward ====" in shown
    assert "GRUCell(3, 4), backward ====" in shown
    assert "there is no stage 'plans'" in run("explain", "--cell", "gru", "--stage", "plans", code=2)
    assert "--gradients goes with --stage" in run("explain", "--cell", "gru", "--gradients", code=2)


def test_cache_is_shown_and_cleared(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSECELL_CACHE", str(tmp_path / "kernels"))
    assert "0 kernels" in run("cache")
    assert "removed 0 kernels" in run("cache", "--clear")
    monkeypatch.setenv("FUSECELL_CACHE", "off")
    assert "no cache in use" in run("cache")


def test_demo_trains_and_goes_on(tmp_path):
    size = ("--hidden-size", 8, "--batch-size", 4, "--steps", 3, "--output", tmp_path)
    shown = run("demo", *size)
    assert "torch.nn.GRU loses to the 5-gram" in shown
    assert "times as many characters a second as torch.nn.GRU" in shown
    assert "going on from step 3" in run("demo", "--resume", *size)
    assert "as torch.nn.GRU" not in run("demo", "--resume", "--layer", "fusecell", *size)


def test_demo_without_a_checkpoint_or_with_another_layer(tmp_path):
    assert "holds no checkpoint to resume" in run("demo", "--resume", "--output", tmp_path, code=2)
    assert "got 'keras'" in run("demo", "--layer", "keras", "--output", tmp_path, code=2)


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_missing_extra_gives_the_install_line(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from fusecell.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.strip() == f'fusecell\'s command line needs {missing}:  pip install "fusecell[demo]"'


def test_other_missing_modules_are_not_hidden():
    code = "import sys; sys.modules['torch'] = None; sys.argv[1:] = ['cells']; from fusecell.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "ModuleNotFoundError" in result.stderr
    assert "torch" in result.stderr


def test_stream_save_and_bench(tmp_path):
    path = tmp_path / "model.fusecell"
    assert "Stream(3 -> 2, float32" in run("stream", "save", f"{__name__}:build", path)
    plain = path.stat().st_size
    run("stream", "save", f"{__name__}:build", path, "--code-for", "x86-64-v3", "--code-for", "x86-64-v4")
    assert path.stat().st_size > plain + 8192
    assert fc.load_stream(path).input_size == 3
    shown = run("stream", "bench", path, "--steps", 500, "--batch-size", 2)
    assert "batch_size=2" in shown
    assert "500 steps, microseconds through Python" in shown
    assert all(word in shown for word in ("p50", "p99", "p99.9", "longest"))
    counts = [line.split(" ")[3].replace(",", "") for line in _histogram(shown)]
    assert sum(map(int, counts)) == 500
    assert "Stream(3 -> 2" in run("stream", "bench", f"{__name__}:build", "--steps", 10)


def _histogram(shown):
    """Lines of `low to high count bars`, found again in words joined by blanks."""
    words = shown.split(" ")
    return [" ".join(words[i - 1 : i + 3]) for i, word in enumerate(words) if word == "to"]


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("nowhere.fusecell", "No such file"),
        ("tests:nothing", "has no attribute"),
        (f"{__name__}:not_a_module", "gave int"),
    ],
)
def test_stream_bench_errors(model, text):
    assert text in run("stream", "bench", model, code=2)


def test_bench():
    arguments = ["--input-size", 5, "--hidden-size", 9, "--seq-len", 20, "--batch-size", 2, "--seconds", 0]
    shown = run("bench", "--cell", "mgu", *arguments, "--training")
    assert "T=20 N=2, forward and backward" in shown
    assert "Python loop" in shown
    assert "x fusecell's time" in shown


def test_export_writes_a_saved_stream_for_a_target(tmp_path):
    fc.Stream(fc.GRU(3, 4)).save(tmp_path / "gru.fusecell")
    shown = run("export", tmp_path / "gru.fusecell", tmp_path / "gru", "--target", "cortex-m4", "--prefix", "spot")
    assert "spot: GRUCell, 3 -> 4, float32, as object for cortex-m4" in shown
    assert "spot_step" in (tmp_path / "gru.h").read_text()
    assert "riscv64" in run("export", "--list")
    assert "No target is called 'vax'" in run(
        "export", tmp_path / "gru.fusecell", tmp_path / "x", "--target", "vax", code=2
    )


def worlds():
    return fc.cells.RSSMCell(2, 5, 9, 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2,5,3", "'prior_mean': 3"), ("2x1,scalar", "got 2 input_sizes"), ("2,,3", "'2,,3' lists no sizes")],
)
def test_sizes_of_several_inputs(text, expected, tmp_path):
    arguments = "stream", "save", "tests.cli.test_cli:worlds", tmp_path / "it", "--input-sizes", text
    assert expected in run(*arguments, code=0 if text == "2,5,3" else 2)
