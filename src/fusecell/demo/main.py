"""Run the whole demo: train, compare, evaluate, write samples and a report."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fusecell.demo.baselines import KneserNey
from fusecell.demo.checkpoint import load_checkpoint
from fusecell.demo.comparison import Lane, race
from fusecell.demo.corpus import Corpus, load_corpus
from fusecell.demo.evaluation import Exam
from fusecell.demo.model import LAYERS
from fusecell.demo.plot import plot_curves
from fusecell.demo.report import Results, Score, print_results
from fusecell.demo.sample import write
from fusecell.demo.settings import Settings
from fusecell.demo.threads import fastest_threads
from fusecell.demo.train import Budget, Trainer

__all__ = ["run_demo"]

_NAMES = {"fusecell": "fusecell.GRU", "torch": "torch.nn.GRU"}


def run_demo(
    settings: Settings | None = None,
    *,
    layers: Sequence[str] = tuple(LAYERS),
    seconds: float = 80.0,
    steps: float = math.inf,
    output: Path = Path("demo-output"),
    resume: bool = False,
    corpus: Corpus | None = None,
    exam: Exam | None = None,
    console: Console | None = None,
) -> Results:
    """Train models in turns, compare them with each other and with the baselines, and write everything to a folder.

    Arguments:
        settings: the model and its training; a resumed run keeps the settings it started with.
        layers: the recurrent layers to train in turns, keys of :data:`fusecell.demo.model.LAYERS`.
        seconds: of training, shared equally by the layers; for a resumed run, in addition to those before.
        steps: updates of each layer after which to stop, if that is sooner.
        output: the folder of ``loss.png``, ``metrics.json``, and for each layer, in a folder of its name,
            ``checkpoint.safetensors``, ``checkpoint.json`` and ``sample.txt``.
        resume: continue from the checkpoints in ``output``.
        corpus: the text; the standard library if left out.
        exam: the held-out characters to score; slices of the whole held-out text if left out.
        console: where to print.

    Returns:
        The figures that ``metrics.json`` holds.

    Raises:
        FileNotFoundError: with ``resume``, if a checkpoint is missing.
        ValueError: for an unknown layer, a text that is too short, or checkpoints that don't fit.
    """
    settings, console = settings or Settings(), console or Console()
    corpus = corpus or load_corpus(settings.seed)
    exam = exam or Exam(corpus.held_out)
    console.print(
        f"{len(corpus.training):,} characters of {len(corpus.training_files)} modules to learn from, "
        f"{len(corpus.held_out):,} of {len(corpus.held_out_files)} others held out, {len(exam):,} of them scored; "
        f"{len(corpus.vocabulary)} different characters"
    )
    trainers = _resume(layers, corpus, output) if resume else _start(settings, layers, corpus)
    if resume:
        done = ", ".join(f"step {trainer.step:,} ({trainer.seconds:.0f} seconds)" for trainer in trainers)
        console.print(f"going on from {done}")
    console.print(
        f"{_parameters(trainers[0]):,} parameters, {seconds / len(trainers):g} seconds for each layer, in turns"
    )
    threads = torch.get_num_threads()
    try:
        lanes = _lanes(trainers, Budget(seconds / len(trainers), steps), corpus, output, console)
        race(lanes, corpus, exam, console)
        results = _results(lanes, corpus, exam)
    finally:
        torch.set_num_threads(threads)
    _write_output(lanes, corpus, exam, results, output, console)
    return results


def _start(settings: Settings, layers: Sequence[str], corpus: Corpus) -> list[Trainer]:
    size = len(corpus.vocabulary)
    return [Trainer.new(replace(settings, layer=layer), corpus.training, size) for layer in layers]


def _resume(layers: Sequence[str], corpus: Corpus, output: Path) -> list[Trainer]:
    trainers = [load_checkpoint(corpus, output / layer) for layer in layers]
    if len({replace(trainer.settings, layer="") for trainer in trainers}) > 1:
        raise ValueError(
            f"the checkpoints in {output} are of models with different settings, which can't race: "
            "start anew without --resume, or go on with one of them by --layer."
        )
    return trainers


def _lanes(trainers: Sequence[Trainer], more: Budget, corpus: Corpus, output: Path, console: Console) -> list[Lane]:
    """Give every trainer ``more`` budget and the number of threads with which it is fastest."""
    # Reversed, so that fusecell is last: the first update of any model loads parts of torch, which would be counted as
    # fusecell's compile time.
    most = torch.get_num_threads()
    threads = [_threads(trainer.settings, corpus, most, console) for trainer in reversed(trainers)][::-1]
    return [
        Lane(
            _NAMES[trainer.settings.layer],
            trainer,
            Budget(trainer.seconds + more.seconds, trainer.step + more.steps),
            count,
            output / trainer.settings.layer,
        )
        for trainer, count in zip(trainers, threads, strict=True)
    ]


def _threads(settings: Settings, corpus: Corpus, most: int, console: Console) -> int:
    """Measure the number of threads with which a layer trains fastest, on a model that is thrown away."""
    trial = Trainer.new(settings, corpus.training, len(corpus.vocabulary))
    torch.set_num_threads(1)
    began = time.perf_counter()
    trial.advance(0.0)
    first = time.perf_counter() - began
    threads = fastest_threads(lambda: trial.advance(0.0), most)
    console.print(
        f"{_NAMES[settings.layer]}: {threads} thread(s); the first update, any compiling included, took {first:.2f} "
        "seconds and isn't counted"
    )
    return threads


def _results(lanes: Sequence[Lane], corpus: Corpus, exam: Exam) -> Results:
    size = len(corpus.vocabulary)
    return Results(
        tuple(
            Score(
                name=lane.name,
                bits=lane.trainer.curve[-1].held_out,
                characters=lane.trainer.characters,
                seconds=lane.trainer.seconds,
                threads=lane.threads,
            )
            for lane in lanes
        ),
        unigram=exam.unigram_bits(corpus.training, size),
        five_gram=exam.ngram_bits(KneserNey(corpus.training, size, order=5)),
    )


def _write_output(
    lanes: Sequence[Lane], corpus: Corpus, exam: Exam, results: Results, output: Path, console: Console
) -> None:
    samples = {}
    for lane in lanes:
        sample = write(lane.trainer.model, corpus.vocabulary, 400, seed=lane.trainer.settings.seed)
        (lane.folder / "sample.txt").write_text(sample, encoding="utf-8")
        samples[lane.name] = sample
    baselines = {"unigram": results.unigram, "5-gram": results.five_gram}
    plot_curves({lane.name: lane.trainer.curve for lane in lanes}, baselines, output / "loss.png")
    metrics = json.dumps(_metrics(lanes, corpus, exam, results), indent=1)
    (output / "metrics.json").write_text(metrics, encoding="utf-8")
    print_results(console, results, samples)
    folders = " and ".join(f"{lane.folder.name}/" for lane in lanes)
    console.print(f"{output}/: loss.png, metrics.json; a checkpoint and sample.txt in {folders}")


def _metrics(lanes: Sequence[Lane], corpus: Corpus, exam: Exam, results: Results) -> dict[str, Any]:
    first = lanes[0].trainer
    settings = first.settings.to_dict()
    del settings["layer"]  # the only setting that differs between the layers
    return {
        **results.to_dict(),
        "steps": {lane.name: lane.trainer.step for lane in lanes},
        "parameters": _parameters(first),
        "settings": settings,
        "training_characters": len(corpus.training),
        "held_out_characters": len(corpus.held_out),
        "scored_characters": len(exam),
        "held_out_files": list(corpus.held_out_files),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": platform.machine(),
    }


def _parameters(trainer: Trainer) -> int:
    return sum(value.numel() for value in trainer.model.parameters())
