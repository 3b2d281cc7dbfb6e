"""What the demo tells: a progress bar while it runs, figures and a verdict at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

__all__ = ["Results", "Telling", "print_results", "telling", "verdict"]


@dataclass(frozen=True, slots=True)
class Results:
    """The figures of a run.

    Arguments:
        model: held-out bits per character of the trained model, under its name.
        unigram, five_gram: of the baselines, on the same characters.
        characters: trained on.
        characters_per_second: in training.
    """

    name: str
    model: float
    unigram: float
    five_gram: float
    characters: int
    characters_per_second: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "characters": self.characters,
            "characters_per_second": round(self.characters_per_second, 1),
            "held_out_bits_per_character": {
                self.name: round(self.model, 4),
                "5-gram": round(self.five_gram, 4),
                "unigram": round(self.unigram, 4),
            },
            "verdict": verdict(self),
        }


class Telling:
    """A progress bar that is told of each step."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("training", total=1.0, bits="", speed="")
        self._smooth: float | None = None

    def step(self, used: float, bits: float, characters_per_second: float) -> None:
        """Show a step: the share of the budget used, its bits per character, and the speed so far."""
        self._smooth = bits if self._smooth is None else 0.95 * self._smooth + 0.05 * bits
        self._progress.update(
            self._task,
            completed=used,
            bits=f"{self._smooth:.3f} bits/char",
            speed=f"{characters_per_second:,.0f} chars/s",
        )


@contextmanager
def telling(console: Console) -> Iterator[Telling]:
    """A progress bar for as long as the block runs."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[bits]}"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield Telling(progress)


def verdict(results: Results) -> str:
    """Whether the model beats the 5-gram, said plainly."""
    gap = results.model - results.five_gram
    if gap < 0:
        return f"{results.name} beats the 5-gram by {-gap:.3f} bits per character."
    return (
        f"{results.name} loses to the 5-gram by {gap:.3f} bits per character: it has not trained long enough. "
        "Go on with: fusecell demo --resume"
    )


def print_results(console: Console, results: Results, sample: str) -> None:
    """The sample, the table and the verdict."""
    console.print(Panel(Text(sample), title="400 characters it wrote", border_style="dim"))
    table = Table("held-out text", "bits per character", title_justify="left")
    for name, bits in (
        ("unigram", results.unigram),
        ("5-gram, Kneser-Ney", results.five_gram),
        (results.name, results.model),
    ):
        table.add_row(name, f"{bits:.3f}")
    console.print(table)
    console.print(verdict(results), style="bold green" if results.model < results.five_gram else "bold yellow")
