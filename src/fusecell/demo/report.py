"""The demo's output: progress bars while it trains, a table and a verdict at its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

__all__ = ["Results", "Score", "TrainingProgress", "print_results", "progress_bars", "verdict"]

_LEVEL_SPEED, _LEVEL_BITS = 1.05, 0.01
"""Ratio of speeds and difference in bits up to which two models are level: repeated runs differ by as much."""


@dataclass(frozen=True, slots=True)
class Score:
    """The figures of a trained model.

    Arguments:
        name: its title.
        bits: per character of held-out text.
        characters: how many it was trained on.
        seconds: how long it was trained.
        threads: how many it trained with.
    """

    name: str
    bits: float
    characters: int
    seconds: float
    threads: int = 1

    @property
    def speed(self) -> float:
        """Characters per second in training."""
        return self.characters / self.seconds


@dataclass(frozen=True, slots=True)
class Results:
    """The figures of a run of the demo.

    Arguments:
        scores: one of each model; of two, the first is compared with the second.
        unigram, five_gram: bits per character of the baselines, on the same characters.
    """

    scores: tuple[Score, ...]
    unigram: float
    five_gram: float

    def speed_ratio(self) -> float | None:
        """Return the first model's characters per second over the second's; None unless there are two."""
        return self.scores[0].speed / self.scores[1].speed if len(self.scores) == 2 else None

    def to_dict(self) -> dict[str, Any]:
        bits = {score.name: score.bits for score in self.scores} | {"5-gram": self.five_gram, "unigram": self.unigram}
        ratio = self.speed_ratio()
        return {
            "held_out_bits_per_character": {name: round(value, 4) for name, value in bits.items()},
            "characters_per_second": {score.name: round(score.speed, 1) for score in self.scores},
            "characters_per_second_ratio": None if ratio is None else round(ratio, 3),
            "characters": {score.name: score.characters for score in self.scores},
            "seconds": {score.name: round(score.seconds, 2) for score in self.scores},
            "threads": {score.name: score.threads for score in self.scores},
            "verdict": verdict(self),
        }


class TrainingProgress:
    """A progress bar for each model, updated by each training step."""

    def __init__(self, progress: Progress, names: Sequence[str]) -> None:
        self._progress = progress
        self._tasks = {name: progress.add_task(name, total=1.0, bits="", speed="") for name in names}
        self._smooth: dict[str, float] = {}

    def step(self, name: str, used: float, bits: float, speed: float) -> None:
        """Show a model's step: the share of its budget used, the step's bits per character, characters per second."""
        # Averaged over about twenty steps: single windows differ by more than training gains in seconds.
        smooth = self._smooth[name] = 0.95 * self._smooth.get(name, bits) + 0.05 * bits
        self._progress.update(
            self._tasks[name], completed=used, bits=f"{smooth:.3f} bits/char", speed=f"{speed:,.0f} chars/s"
        )


@contextmanager
def progress_bars(console: Console, names: Sequence[str]) -> Iterator[TrainingProgress]:
    """Show a progress bar for each name while the block runs."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[bits]}"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield TrainingProgress(progress, names)


def verdict(results: Results) -> str:
    """Say in a few sentences which model won, and whether each beats the 5-gram baseline."""
    sentences = [_compare(*results.scores)] if len(results.scores) == 2 else []
    for score in results.scores:
        gap = score.bits - results.five_gram
        outcome = f"beats the 5-gram by {-gap:.3f}" if gap < 0 else f"loses to the 5-gram by {gap:.3f}"
        sentences.append(f"{score.name} {outcome} bits per character.")
    if any(score.bits >= results.five_gram for score in results.scores):
        sentences.append("What loses has not trained long enough; go on with the same command and --resume.")
    return " ".join(sentences)


def _compare(one: Score, other: Score) -> str:
    """Compare the first model's speed and bits with the second's, in a sentence."""
    ratio, lead = one.speed / other.speed, other.bits - one.bits
    speed = f"{one.name} read {ratio:.2f} times as many characters a second as {other.name}"
    if 1 / _LEVEL_SPEED <= ratio <= _LEVEL_SPEED:
        speed += ", which is as good as equal"
    if abs(one.seconds - other.seconds) > 0.1 * max(one.seconds, other.seconds):
        return f"{speed}. They trained for {one.seconds:.0f} and {other.seconds:.0f} seconds: their bits are no race."
    bits = f"{abs(lead):.3f} bits per character {'ahead' if lead > 0 else 'behind'}"
    if abs(lead) < _LEVEL_BITS:
        bits = f"level with it, {bits}"
    return f"{speed}; after {one.seconds:.0f} seconds each it is {bits}."


def print_results(console: Console, results: Results, samples: Mapping[str, str]) -> None:
    """Print the best model's sample, the table of figures and the verdict."""
    best = min(results.scores, key=lambda score: score.bits)
    title = f"400 characters that {best.name} wrote"
    console.print(Panel(Text(samples[best.name]), title=title, border_style="dim"))
    table = Table("held-out text", title_justify="left")
    for column in ("bits per character", "characters a second", "characters read"):
        table.add_column(column, justify="right")
    table.add_row("unigram", f"{results.unigram:.3f}")
    table.add_row("5-gram, Kneser-Ney", f"{results.five_gram:.3f}")
    for score in reversed(results.scores):
        table.add_row(score.name, f"{score.bits:.3f}", f"{score.speed:,.0f}", f"{score.characters:,}")
    console.print(table)
    won = results.scores[0].bits <= min(results.five_gram, *(score.bits for score in results.scores))
    console.print(verdict(results), style="bold green" if won else "bold yellow")
