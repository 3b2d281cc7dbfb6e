"""The demo: its text, its training, the race, and the whole job in two seconds."""

import dataclasses
import io
import itertools
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from rich.console import Console
from torch import nn

import fusecell as fc
from fusecell.demo import Settings, run_demo
from fusecell.demo.baselines import KneserNey
from fusecell.demo.checkpoint import load_checkpoint, save_checkpoint
from fusecell.demo.comparison import Lane, race
from fusecell.demo.corpus import Corpus, Vocabulary, held_out, load_corpus
from fusecell.demo.evaluation import Exam
from fusecell.demo.model import build_model
from fusecell.demo.plot import plot_curves
from fusecell.demo.report import Results, Score, verdict
from fusecell.demo.sample import write
from fusecell.demo.threads import fastest_threads
from fusecell.demo.train import Budget, Point, Trainer, in_rows

TINY = Settings(embedding_size=6, hidden_size=9, batch_size=5, window=7)


@pytest.fixture(scope="module")
def corpus():
    line = "def f(x):\n    return x + 1\n\n"
    vocabulary = Vocabulary.of(line * 60)
    return Corpus(vocabulary, vocabulary.encode(line * 60), vocabulary.encode(line * 30), ("a.py",), ("b.py",))


def quiet():
    return Console(file=io.StringIO(), width=100)


def small_exam(corpus):
    return Exam(corpus.held_out, rows=4, warmup=16)


# The text


def test_the_standard_library_is_split_by_file():
    corpus = load_corpus()
    assert len(corpus.training) > 5 * len(corpus.held_out) > 100_000
    assert not set(corpus.training_files) & set(corpus.held_out_files)
    assert all(held_out(name) for name in corpus.held_out_files)
    assert (corpus.held_out == 0).mean() < 0.001


def test_the_split_depends_on_the_name_alone(tmp_path):
    for name in ("enum.py", "trace.py", "turtle.py", "os.py"):
        (tmp_path / name).write_text("# the enum trace\n" * 60 + name)
    corpus = load_corpus(folder=tmp_path)
    assert sorted(corpus.held_out_files) == ["enum.py", "trace.py"]
    assert corpus.vocabulary.decode(corpus.held_out).count("# the enum trace\n") == 120


def test_a_library_without_sources_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="0 Python modules"):
        load_corpus(folder=tmp_path)


def test_a_vocabulary_goes_both_ways():
    vocabulary = Vocabulary.of("aab\nab~", rare=2)
    assert len(vocabulary) == 3
    assert vocabulary.decode(vocabulary.encode("ab~a")) == "ab\N{REPLACEMENT CHARACTER}a"


# Training


def test_rows_are_contiguous_text():
    rows = in_rows(np.arange(17), 3)
    assert rows.shape == (5, 3)
    assert torch.equal(rows.T.flatten(), torch.arange(15))


def test_windows_go_through_the_whole_row_with_the_state_carried(corpus):
    trainer = Trainer.new(TINY, corpus.training, len(corpus.vocabulary))
    per_pass = (len(trainer.text) - 1) // TINY.window
    seen, carried = [], []
    forward = trainer.model.forward
    trainer.model.forward = lambda ids, state: (seen.append(ids), carried.append(state), forward(ids, state))[2]
    for _ in range(per_pass + 1):
        trainer.advance(0.5)
    whole = torch.cat(seen[:per_pass])
    assert torch.equal(whole, trainer.text[: len(whole)])
    assert torch.equal(seen[-1], seen[0])
    assert [state is None for state in carried] == [True] + [False] * (per_pass - 1) + [True]
    assert not any(state.requires_grad for state in carried[1:-1])


def test_an_exam_scores_every_model_on_the_same_characters(corpus):
    size = len(corpus.vocabulary)
    exam = Exam(corpus.held_out, rows=3, warmup=20, scored=77)
    length = len(corpus.held_out) // 3
    assert len(exam) == 3 * 77
    model = build_model(TINY, size)
    ngram = KneserNey(corpus.training, size, 3)
    by_model, by_ngram = [], []
    for row in range(3):
        ids = torch.from_numpy(corpus.held_out[row * length : row * length + 97])
        with torch.no_grad():
            scores, _ = model(ids[:-1, None])
        by_model.append(nn.functional.cross_entropy(scores[19:, 0], ids[20:]).item() / math.log(2))
        # An n-gram model sees the characters before it and needs no warming up.
        by_ngram.append(-np.log2(ngram.probabilities(ids[18:].numpy())).mean())
    for window in (7, 20, 64, 200):
        assert exam.bits(model, window) == pytest.approx(np.mean(by_model), rel=1e-5)
    assert exam.ngram_bits(ngram) == pytest.approx(np.mean(by_ngram), rel=1e-12)
    frequencies = (np.bincount(corpus.training, minlength=size) + 1) / (len(corpus.training) + size)
    scored = np.concatenate([corpus.held_out[row * length + 20 : row * length + 97] for row in range(3)])
    assert exam.unigram_bits(corpus.training, size) == pytest.approx(-np.log2(frequencies[scored]).mean(), rel=1e-12)


def test_an_exam_needs_text():
    with pytest.raises(ValueError, match="lower rows or warmup"):
        Exam(np.zeros(100, np.int64), rows=2, warmup=50)


def test_equal_seeds_train_fusecell_and_torch_alike(corpus):
    trainers = [
        Trainer.new(dataclasses.replace(TINY, layer=layer), corpus.training, len(corpus.vocabulary))
        for layer in ("fusecell", "torch")
    ]
    assert isinstance(trainers[0].model.layer, fc.GRU)
    assert not isinstance(trainers[1].model.layer, fc.GRU)
    bits = [[trainer.advance(step / 20) for step in range(20)] for trainer in trainers]
    assert bits[0] == pytest.approx(bits[1], abs=1e-4)
    assert sum(bits[0][-5:]) < sum(bits[0][:5])


def test_an_unknown_layer_is_an_error(corpus):
    with pytest.raises(ValueError, match="fusecell, torch; got 'keras'"):
        Trainer.new(dataclasses.replace(TINY, layer="keras"), corpus.training, len(corpus.vocabulary))


def test_too_short_a_text_is_an_error():
    with pytest.raises(ValueError, match="lower batch_size or window"):
        Trainer.new(TINY, np.zeros(35, np.int64), 3)


def test_the_learning_rate_rises_and_falls(corpus):
    trainer = Trainer.new(TINY, corpus.training, len(corpus.vocabulary))
    rates = [trainer.learning_rate(used / 100) for used in range(101)]
    peak = rates.index(max(rates))
    assert max(rates) == TINY.learning_rate
    assert 0 < peak < 10
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[-1] < 0.05 * TINY.learning_rate


def test_a_resumed_run_is_the_run_uninterrupted(corpus, tmp_path):
    size = len(corpus.vocabulary)
    whole, part = (Trainer.new(TINY, corpus.training, size) for _ in range(2))
    together = [whole.advance(step / 12) for step in range(12)]
    apart = [part.advance(step / 12) for step in range(5)]
    save_checkpoint(part, corpus, tmp_path)
    resumed = load_checkpoint(corpus, tmp_path)
    apart += [resumed.advance(step / 12) for step in range(5, 12)]
    assert apart == together
    assert all(torch.equal(*pair) for pair in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_checkpoints_that_do_not_fit_are_errors(corpus, tmp_path):
    with pytest.raises(FileNotFoundError, match="without --resume"):
        load_checkpoint(corpus, tmp_path)
    trainer = Trainer.new(TINY, corpus.training, len(corpus.vocabulary))
    save_checkpoint(trainer, corpus, tmp_path)
    assert load_checkpoint(corpus, tmp_path).step == 0
    with pytest.raises(ValueError, match="other characters"):
        load_checkpoint(dataclasses.replace(corpus, vocabulary=Vocabulary("abc")), tmp_path)
    config = json.loads((tmp_path / "checkpoint.json").read_text(encoding="utf-8"))
    (tmp_path / "checkpoint.json").write_text(json.dumps({**config, "step": 3}))
    with pytest.raises(ValueError, match=r"of step 0 and checkpoint\.json of step 3"):
        load_checkpoint(corpus, tmp_path)


DAMAGED_CONFIGS = {
    "no JSON": (lambda config: "{", "Expecting"),
    "nested without end": (lambda config: "[" * 100_000, "nests deeper than 3"),
    "a list": (lambda config: [config], "expected settings, vocabulary"),
    "a key less": (lambda config: config.pop("curve") and config, "expected settings, vocabulary"),
    "a step of true": (lambda config: {**config, "step": True}, "step of it is True, expected int"),
    "a negative step": (lambda config: {**config, "step": -1}, "out of range are {'step': -1}"),
    "seconds of infinity": (lambda config: {**config, "seconds": float("inf")}, "expected a finite number"),
    "a setting more": (lambda config: config["settings"].update(more=1) or config, "its settings is"),
    "a size of a text": (
        lambda config: config["settings"].update(window="9") or config,
        "window of its settings is '9'",
    ),
    "no layers": (
        lambda config: config["settings"].update(num_layers=0) or config,
        "out of range are {'num_layers': 0}",
    ),
    "a point that is none": (lambda config: config["curve"].append(3) or config, "a point of its curve is 3"),
}


@pytest.mark.parametrize("kind", DAMAGED_CONFIGS)
def test_damaged_configs_of_checkpoints_are_refused(corpus, tmp_path, kind):
    change, text = DAMAGED_CONFIGS[kind]
    save_checkpoint(Trainer.new(TINY, corpus.training, len(corpus.vocabulary)), corpus, tmp_path)
    path = tmp_path / "checkpoint.json"
    config = change(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(text)):
        load_checkpoint(corpus, tmp_path)


def test_checkpoints_whose_tensors_do_not_fit_are_refused(corpus, tmp_path):
    """Tensors are checked before the configured model is allocated."""
    save_checkpoint(Trainer.new(TINY, corpus.training, len(corpus.vocabulary)), corpus, tmp_path)
    path, config = tmp_path / "checkpoint.json", json.loads((tmp_path / "checkpoint.json").read_text(encoding="utf-8"))
    for changes, text in (
        ({"hidden_size": 10**6}, r"is torch\.float32 of shape .*, expected torch\.float32 of \("),
        ({"num_layers": 10**6}, r"1000000 layers don't fit \d+ tensors"),
        ({"num_layers": 3}, "its tensors differ from the model's in"),
    ):
        path.write_text(json.dumps({**config, "settings": {**config["settings"], **changes}}), encoding="utf-8")
        with pytest.raises(ValueError, match=text):
            load_checkpoint(corpus, tmp_path)
    path.write_text(json.dumps(config), encoding="utf-8")
    whole = (tmp_path / "checkpoint.safetensors").read_bytes()
    for content in (whole[:-1], whole[:20], b"", whole + b"1"):
        (tmp_path / "checkpoint.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged: .* Start anew without --resume"):
            load_checkpoint(corpus, tmp_path)


def test_the_number_of_threads_is_measured_and_not_kept():
    before = torch.get_num_threads()
    used = []
    assert fastest_threads(lambda: used.append(torch.get_num_threads()), most=3) in (1, 2, 3)
    assert set(used) == {1, 2, 3}
    assert torch.get_num_threads() == before


def test_threads_that_only_wait_are_given_up(monkeypatch):
    clock = [0.0]
    used = []

    def work():
        used.append(torch.get_num_threads())
        clock[0] += {1: 2.0, 2: 1.0, 3: 30.0}[torch.get_num_threads()]

    monkeypatch.setattr("fusecell.demo.threads.time.perf_counter", lambda: clock[0])
    assert fastest_threads(work, most=3) == 2
    assert [used.count(threads) for threads in (1, 2, 3)] == [4, 4, 2]


# Writing and telling


def test_writing_carries_the_state_and_is_repeatable(corpus):
    model = build_model(TINY, len(corpus.vocabulary))
    text = write(model, corpus.vocabulary, 40, prompt="def ", seed=3)
    assert len(text) == 40
    assert Vocabulary.unknown not in text
    assert text == write(model, corpus.vocabulary, 40, prompt="def ", seed=3)
    # With choices as good as certain, each character is the best after the whole text before it, read at once.
    sure = write(model, corpus.vocabulary, 40, prompt="def ", temperature=1e-6)
    with torch.no_grad():
        scores, _ = model(torch.from_numpy(corpus.vocabulary.encode("def " + sure))[:, None])
    scores[:, :, 0] = -torch.inf
    assert corpus.vocabulary.decode(scores[3:-1, 0].argmax(-1).tolist()) == sure


def results(bits=2.5, other_bits=2.6, characters=3000, seconds=10.0, other_seconds=10.0):
    fusecell, torch_nn = (
        Score("fusecell.GRU", bits, characters, seconds),
        Score("torch.nn.GRU", other_bits, 1000, other_seconds),
    )
    return Results((fusecell, torch_nn), unigram=4.4, five_gram=1.9)


@pytest.mark.parametrize(
    ("outcome", "text"),
    [
        (results(), "fusecell.GRU read 3.00 times as many characters a second as torch.nn.GRU; after 10 seconds each"),
        (results(), "each it is 0.100 bits per character ahead."),
        (results(bits=2.9), "each it is 0.300 bits per character behind."),
        (results(bits=2.595), "it is level with it, 0.005 bits per character ahead."),
        (results(characters=500), "read 0.50 times as many characters a second as torch.nn.GRU; after"),
        (results(characters=1040), "read 1.04 times as many characters a second as torch.nn.GRU, which is as good as"),
        (results(seconds=30.0), "They trained for 30 and 10 seconds: their bits are no race."),
        (results(), "fusecell.GRU loses to the 5-gram by 0.600 bits per character. torch.nn.GRU loses to"),
        (results(), "--resume"),
        (results(bits=1.8), "fusecell.GRU beats the 5-gram by 0.100 bits per character. torch.nn.GRU loses to"),
        (Results(results(bits=1.8).scores[:1], 4.4, 1.9), "fusecell.GRU beats the 5-gram by 0.100 bits per character."),
    ],
)
def test_the_verdict_is_plain(outcome, text):
    assert text in verdict(outcome)


def test_without_a_second_model_or_a_loss_the_verdict_is_one_sentence():
    assert verdict(Results(results(bits=1.8).scores[:1], 4.4, 1.9)).count(".") == 3  # a name, a number, an end


def test_equal_work_takes_turns(corpus):
    size = len(corpus.vocabulary)
    trainers = [Trainer.new(TINY, corpus.training, size) for _ in range(2)]
    order = []
    for name, trainer in zip("ab", trainers, strict=True):
        trainer.advance = lambda used, name=name, trainer=trainer: advance(name, trainer)

    def advance(name, trainer):
        order.append(name)
        trainer.step += 1
        trainer.seconds += 0.1 if name == "a" else 0.3
        return 3.0

    lanes = [Lane(name, trainer, Budget(6.0), 1, None) for name, trainer in zip("ab", trainers, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fusecell.demo.comparison.save_checkpoint", lambda trainer, corpus, folder: None)
        # Points are left out where evaluating takes too long, which depends on the machine.
        patch.setattr("fusecell.demo.comparison._EVALUATION", math.inf)
        race(lanes, corpus, small_exam(corpus), quiet(), points=3)
    turns = ["".join(group) for _, group in itertools.groupby(order)]
    assert [turn[0] for turn in turns] == ["a", "b"] * 6
    assert all(9 <= len(turn) <= 11 for turn in turns[::2])
    assert all(3 <= len(turn) <= 4 for turn in turns[1::2])
    for trainer in trainers:
        assert trainer.seconds == pytest.approx(6.0, abs=0.31)
        assert [point.seconds for point in trainer.curve] == pytest.approx([2, 4, 6], abs=0.31)


def test_both_curves_are_drawn_and_their_labels_kept_apart(tmp_path, monkeypatch):
    def curve(bits):
        return [Point(seconds, seconds * 1000, bits + 1 / seconds, bits + 2 / seconds) for seconds in (1, 2, 3)]

    lines, labels = [], {}
    plot, annotate = Axes.plot, Axes.annotate
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **style: (lines.append(list(y)), plot(self, x, y, **style))[1])

    def record(self, text, xy, offset, **style):
        annotation = annotate(self, text, xy, offset, **style)
        labels[text] = annotation
        return annotation

    monkeypatch.setattr(Axes, "annotate", record)
    plot_curves({"one": curve(2.0), "other": curve(2.01)}, {"5-gram": 1.9}, tmp_path / "loss.png")
    assert [2.0 + 2 / seconds for seconds in (1, 2, 3)] in lines
    assert [2.01 + 2 / seconds for seconds in (1, 2, 3)] in lines
    boxes = [label.get_window_extent() for text, label in labels.items() if "million" in text]
    assert len(boxes) == 2
    assert not boxes[0].overlaps(boxes[1])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_whole_race_and_its_resumption(corpus, tmp_path):
    console = quiet()
    job = {"seconds": 60, "steps": 40, "output": tmp_path, "corpus": corpus, "exam": small_exam(corpus)}
    first = run_demo(TINY, **job, console=console)
    again = run_demo(**job, console=console, resume=True)
    # Equal seeds and equal steps: the same model, whoever computes it.
    assert [score.name for score in first.scores] == ["fusecell.GRU", "torch.nn.GRU"]
    assert first.scores[0].bits == pytest.approx(first.scores[1].bits, abs=1e-3)
    for before, after in zip(first.scores, again.scores, strict=True):
        assert after.characters == 2 * before.characters == 2 * 40 * 5 * 7
        assert after.bits < before.bits < math.log2(len(corpus.vocabulary))
    shown = " ".join(console.file.getvalue().split())
    assert "going on from step 40" in shown
    assert verdict(again).split(";")[0] in shown
    for layer in ("fusecell", "torch"):
        assert len((tmp_path / layer / "sample.txt").read_text(encoding="utf-8")) == 400
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    bits, speeds = metrics["held_out_bits_per_character"], metrics["characters_per_second"]
    assert bits["torch.nn.GRU"] == round(again.scores[1].bits, 4)
    assert metrics["characters_per_second_ratio"] == pytest.approx(
        speeds["fusecell.GRU"] / speeds["torch.nn.GRU"], abs=1e-3
    )
    assert metrics["steps"] == {"fusecell.GRU": 80, "torch.nn.GRU": 80}


def test_models_of_different_sizes_do_not_race(corpus, tmp_path):
    for layer, hidden_size in (("fusecell", 9), ("torch", 8)):
        settings = dataclasses.replace(TINY, layer=layer, hidden_size=hidden_size)
        save_checkpoint(Trainer.new(settings, corpus.training, len(corpus.vocabulary)), corpus, tmp_path / layer)
    with pytest.raises(ValueError, match="different settings"):
        run_demo(output=tmp_path, corpus=corpus, exam=small_exam(corpus), console=quiet(), resume=True)


def test_two_seconds_of_the_real_thing(tmp_path, monkeypatch):
    """With a clock that counts a fiftieth of a second per update, on any machine."""
    clock = itertools.count()
    monkeypatch.setattr("fusecell.demo.train.time", SimpleNamespace(perf_counter=lambda: next(clock) / 50))
    settings = dataclasses.replace(TINY, hidden_size=48)
    outcome = run_demo(settings, layers=["fusecell"], seconds=2, output=tmp_path, console=quiet())
    assert outcome.five_gram < 2.5 < outcome.unigram < 5
    assert outcome.scores[0].bits < 6
    assert outcome.speed_ratio() is None
    assert not (tmp_path / "torch").exists()
    assert Budget(seconds=2).used(load_checkpoint(load_corpus(), tmp_path / "fusecell")) == 1


def test_an_interruption_leaves_a_checkpoint(corpus, tmp_path, monkeypatch):
    advance = Trainer.advance

    def interrupted(self, used):
        if self.step == 4:
            raise KeyboardInterrupt
        return advance(self, used)

    monkeypatch.setattr(Trainer, "advance", interrupted)
    monkeypatch.setattr("fusecell.demo.main.fastest_threads", lambda work, most: 1)
    with pytest.raises(KeyboardInterrupt):
        run_demo(TINY, seconds=60, steps=9, output=tmp_path, corpus=corpus, exam=small_exam(corpus), console=quiet())
    assert load_checkpoint(corpus, tmp_path / "fusecell").step == 4
    assert load_checkpoint(corpus, tmp_path / "torch").step <= 4
