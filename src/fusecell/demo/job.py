"""The main job from end to end."""

from __future__ import annotations

import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fusecell.demo.baselines import KneserNey
from fusecell.demo.checkpoint import load_checkpoint, save_checkpoint
from fusecell.demo.corpus import Corpus, load_corpus
from fusecell.demo.exam import Exam
from fusecell.demo.plot import plot_curves
from fusecell.demo.report import Results, print_results, telling
from fusecell.demo.sample import write
from fusecell.demo.settings import Settings
from fusecell.demo.threads import fastest_threads
from fusecell.demo.train import Budget, Point, Trainer

__all__ = ["run_demo", "train"]

_SAVE_EVERY = 20.0
_EVALUATION = 0.08
"""The largest share of the time that goes into points of the curve: a slow machine draws fewer."""


def run_demo(
    settings: Settings | None = None,
    *,
    seconds: float = 90.0,
    steps: float = math.inf,
    output: Path = Path("demo-output"),
    resume: bool = False,
    corpus: Corpus | None = None,
    exam: Exam | None = None,
    console: Console | None = None,
) -> Results:
    """Train, compare with the baselines, write a sample, and leave everything in a folder.

    Arguments:
        settings: of the model and its training; a resumed run keeps those it was begun with.
        seconds, steps: to train, whichever is reached first; on top of what a resumed run has behind it.
        output: the folder of ``checkpoint.safetensors``, ``checkpoint.json``, ``loss.png``, ``sample.txt``
            and ``metrics.json``.
        resume: go on from the checkpoint in ``output``.
        corpus: another text than the standard library's.
        exam: other held-out characters to be scored on than slices from all over the corpus.
        console: where to print.

    Returns:
        The figures, which ``metrics.json`` holds too.
    """
    settings, console = settings or Settings(), console or Console()
    corpus = corpus or load_corpus(settings.seed)
    exam = exam or Exam(corpus.held_out)
    console.print(
        f"{len(corpus.training):,} characters of {len(corpus.training_files)} modules to learn from, "
        f"{len(corpus.held_out):,} of {len(corpus.held_out_files)} others held out, {len(exam):,} of them scored; "
        f"{len(corpus.vocabulary)} different characters"
    )
    if resume:
        trainer = load_checkpoint(corpus, output)
        console.print(f"going on from step {trainer.step:,} ({trainer.seconds:.0f} seconds of training)")
    else:
        trainer = Trainer.new(settings, corpus.training, len(corpus.vocabulary))
    budget = Budget(trainer.seconds + seconds, trainer.step + steps)
    before = torch.get_num_threads()
    torch.set_num_threads(_threads(trainer.settings, corpus))
    try:
        console.print(f"{_name(trainer)}, {_parameters(trainer):,} parameters, {torch.get_num_threads()} thread(s)")
        train(trainer, corpus, exam, budget, output, console)
        results = _results(trainer, corpus, exam)
    finally:
        torch.set_num_threads(before)
    _write_output(trainer, corpus, exam, results, output, console)
    return results


def train(
    trainer: Trainer, corpus: Corpus, exam: Exam, budget: Budget, output: Path, console: Console, points: int = 12
) -> None:
    """Use up a budget, adding about ``points`` points to the learning curve and saving as it goes.

    The checkpoint is saved on the way out too, an interruption included.
    """
    begun, saved = budget.used(trainer), time.monotonic()
    shown, since, spent = begun, [0.0, 0], 0.0
    try:
        with telling(console) as tell:
            for bits in trainer.run(budget):
                used = budget.used(trainer)
                tell.step((used - begun) / (1 - begun), bits, trainer.characters / trainer.seconds)
                since = [since[0] + bits, since[1] + 1]
                due = used - shown >= (1 - begun) / points and spent < _EVALUATION * trainer.seconds
                if due or used == 1:
                    began = time.monotonic()
                    training, held_out = since[0] / since[1], exam.bits(trainer.model)
                    spent += time.monotonic() - began
                    trainer.curve.append(Point(trainer.seconds, trainer.characters, training, held_out))
                    shown, since = used, [0.0, 0]
                if time.monotonic() - saved > _SAVE_EVERY:
                    save_checkpoint(trainer, corpus, output)
                    saved = time.monotonic()
    finally:
        save_checkpoint(trainer, corpus, output)


def _threads(settings: Settings, corpus: Corpus) -> int:
    trial = Trainer.new(settings, corpus.training, len(corpus.vocabulary))
    return fastest_threads(lambda: trial.advance(0.0))


def _results(trainer: Trainer, corpus: Corpus, exam: Exam) -> Results:
    size = len(corpus.vocabulary)
    return Results(
        name=_name(trainer),
        model=trainer.curve[-1].held_out,
        unigram=exam.unigram_bits(corpus.training, size),
        five_gram=exam.ngram_bits(KneserNey(corpus.training, size, order=5)),
        characters=trainer.characters,
        characters_per_second=trainer.characters / trainer.seconds,
    )


def _write_output(
    trainer: Trainer, corpus: Corpus, exam: Exam, results: Results, output: Path, console: Console
) -> None:
    sample = write(trainer.model, corpus.vocabulary, 400, seed=trainer.settings.seed)
    (output / "sample.txt").write_text(sample, encoding="utf-8")
    baselines = {"unigram": results.unigram, "5-gram": results.five_gram}
    plot_curves({results.name: trainer.curve}, baselines, output / "loss.png")
    (output / "metrics.json").write_text(
        json.dumps(_metrics(trainer, corpus, exam, results), indent=1), encoding="utf-8"
    )
    print_results(console, results, sample)
    console.print(f"{output}/: checkpoint.safetensors, checkpoint.json, loss.png, sample.txt, metrics.json")


def _metrics(trainer: Trainer, corpus: Corpus, exam: Exam, results: Results) -> dict[str, Any]:
    return {
        **results.to_dict(),
        "seconds": round(trainer.seconds, 2),
        "steps": trainer.step,
        "parameters": _parameters(trainer),
        "settings": trainer.settings.to_dict(),
        "training_characters": len(corpus.training),
        "held_out_characters": len(corpus.held_out),
        "scored_characters": len(exam),
        "held_out_files": list(corpus.held_out_files),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": platform.machine(),
    }


def _name(trainer: Trainer) -> str:
    return {"fusecell": "fusecell.GRU", "torch": "torch.nn.GRU"}[trainer.settings.layer]


def _parameters(trainer: Trainer) -> int:
    return sum(value.numel() for value in trainer.model.parameters())
