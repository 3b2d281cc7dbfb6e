"""Look inside a character model: train it a little, record a sentence, and write a page that shows every gate.

The model reads Python's own source letter by letter and predicts the next one. The page shows every gate of both
layers at every letter and, with ``gradients=True``, the gradient of the loss at each value.

    python examples/look_inside.py --seconds 20
"""

from __future__ import annotations

import argparse
import pathlib
import time

import torch
from torch import Tensor, nn

import fusecell as fc


def text() -> str:
    """Return some hundred thousand letters of Python's standard library."""
    folder = pathlib.Path(argparse.__file__).parent
    names = ("argparse", "pathlib", "textwrap", "random", "statistics", "heapq", "calendar")
    return "".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in names)


class Letters(nn.Module):
    """A character model: two layers of GRU and a readout, from one-hot letters to scores of the next letter."""

    def __init__(self, alphabet: str, hidden: int = 64) -> None:
        super().__init__()
        self.alphabet = alphabet
        self.rnn = fc.GRU(len(alphabet), hidden, num_layers=2)
        self.head = nn.Linear(hidden, len(alphabet))

    def one_hot(self, letters: str) -> Tensor:
        """Encode letters as (len(letters), len(alphabet))."""
        index = torch.tensor([self.alphabet.index(letter) for letter in letters])
        return nn.functional.one_hot(index, len(self.alphabet)).float()


def train(seconds: float, *, updates: int | None = None, seed: int = 0) -> Letters:
    """Train a model for some seconds, or a number of updates."""
    torch.manual_seed(seed)
    source = text()
    model = Letters("".join(sorted(set(source))))
    codes = torch.tensor([model.alphabet.index(letter) for letter in source])
    steps, rows = 64, 32
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    began, update = time.perf_counter(), 0
    while update < updates if updates is not None else time.perf_counter() - began < seconds:
        starts = torch.randint(len(codes) - steps - 1, (rows,))
        window = codes[starts + torch.arange(steps + 1)[:, None]]
        y, _ = model.rnn(nn.functional.one_hot(window[:-1], len(model.alphabet)).float())
        loss = nn.functional.cross_entropy(model.head(y).flatten(0, 1), window[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update += 1
    return model


def record(model: Letters, line: str) -> fc.Tape:
    """Record a tape of the model reading a line, with the gradients of its loss."""
    x = model.one_hot(line)[:, None]
    tape = fc.record(model.rnn, x, labels=list(line), gradients=True)
    scores = model.head(tape.outputs)[:-1, 0]
    nn.functional.cross_entropy(scores, x[1:, 0].argmax(-1)).backward()
    return tape


def main() -> None:
    """Train, record and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20, help="how long to train")
    parser.add_argument("--page", type=pathlib.Path, default=pathlib.Path("tape.html"), help="the page to write")
    parser.add_argument("--line", default="    def add(self, name):  # again", help="what to read")
    options = parser.parse_args()
    tape = record(train(options.seconds), options.line)
    tape.save_html(options.page, title="A GRU reads Python")
    low, high = tape.saturation("z", layer=1)
    print(
        f"{options.page}: {tape.steps} letters; the upper layer's z is below 0.1 in {low:.0%}, above 0.9 in {high:.0%}"
    )


if __name__ == "__main__":
    main()
