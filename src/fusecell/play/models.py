"""The models of the page: small cells, trained on texts that come with Python and on curves that are drawn here."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusecell.cells.registry import CELLS, ZooCell
from fusecell.layers import Recurrent
from fusecell.play.cell import PlayCell

__all__ = ["ALPHABET", "KINDS", "TASKS", "Model", "Task", "encode", "train_models", "zoo_cell"]

KINDS = ("gru", "gru_reset_before", "lstm", "rnn_tanh")
"""The cells of the page unless others are asked for, by their names in :data:`fusecell.CELLS`."""
ALPHABET = " abcdefghijklmnopqrstuvwxyz.,'"
"""What the models of texts read; any other character is a space."""
_ROWS, _STEPS = 32, 60
_LEARNING_RATE = 1e-2


@dataclass(frozen=True)
class Task:
    """What a model reads and predicts, one step ahead.

    Arguments:
        features: of the input and of the prediction.
        hidden_size: units of the cell.
        updates: of the training.
        batch: draws a batch of sequences, (steps + 1, rows, features), from a generator, of those to train on or of
            those that are held out.
        loss: of predictions and what came, (steps, rows, features) each; a mean per step.
    """

    features: int
    hidden_size: int
    updates: int
    batch: Callable[[torch.Generator, bool], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Model:
    """A trained cell with its readout, and its loss on sequences that it wasn't trained on."""

    task: str
    kind: str
    cell: PlayCell
    loss: float


def encode(text: str) -> Tensor:
    """Encode a text as one-hot vectors, (len(text), len(ALPHABET))."""
    codes = torch.tensor([max(0, ALPHABET.find(letter)) for letter in text.lower()], dtype=torch.long)
    return nn.functional.one_hot(codes, len(ALPHABET)).float()


def _prose() -> str:
    """Return Python's own help on its language, paragraphs of prose alone, in the letters of the alphabet."""
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            "The models of texts learn from pydoc_data.topics, Python's own help, which this installation of Python "
            "leaves out: use a complete one (on Debian and Ubuntu: apt-get install python3).",
            name=missing.name,
        ) from missing
    text = "\n".join(topics[name] for name in sorted(topics))
    paragraphs = [part for part in text.split("\n\n") if not part.startswith("   ") and "::=" not in part]
    plain = re.sub(rf"[^{re.escape(ALPHABET)}]", " ", " ".join(paragraphs).lower())
    return re.sub(r" [ .,']* ", " ", re.sub(r" +", " ", plain))


@functools.cache
def _prose_codes() -> Tensor:
    return encode(_prose()).argmax(-1)


def _texts(generator: torch.Generator, held_out: bool) -> Tensor:
    codes = _prose_codes()
    edge = len(codes) * 9 // 10
    codes = codes[edge:] if held_out else codes[:edge]
    starts = torch.randint(len(codes) - _STEPS - 1, (_ROWS,), generator=generator)
    windows = codes[starts + torch.arange(_STEPS + 1)[:, None]]
    return nn.functional.one_hot(windows, len(ALPHABET)).float()


def _curves(generator: torch.Generator, held_out: bool) -> Tensor:
    """Draw sums of two waves, every third of them a square wave; no two batches share one."""
    shape, t = (_ROWS, 2), torch.arange(_STEPS + 1.0)[:, None, None]
    period = 8 + 32 * torch.rand(shape, generator=generator)
    phase = 2 * math.pi * torch.rand(shape, generator=generator)
    height = torch.rand(shape, generator=generator)
    height = 0.9 * height / height.sum(1, keepdim=True)
    waves = torch.sin(2 * math.pi * t / period + phase)
    waves[:, ::3] = waves[:, ::3].sign()
    return (waves * height).sum(-1, keepdim=True)


def _surprise(predicted: Tensor, came: Tensor) -> Tensor:
    """Return the cross-entropy in bits per letter."""
    nats = nn.functional.cross_entropy(predicted.flatten(0, 1), came.flatten(0, 1).argmax(-1))
    return nats / math.log(2)


TASKS = {
    "text": Task(len(ALPHABET), 32, 3000, _texts, _surprise),
    "curve": Task(1, 16, 2000, _curves, nn.functional.mse_loss),
}
"""By their names: the next letter of a text, and the next point of a curve."""


def train_models(seed: int = 0, *, kinds: Sequence[str] = KINDS, updates: int | None = None) -> list[Model]:
    """Train a model of every kind for every task.

    Example:
        >>> from fusecell.play import train_models
        >>> models = train_models(updates=1)
        >>> [f"{model.task}/{model.kind}" for model in models][:2]
        ['text/gru', 'text/gru_reset_before']

    Arguments:
        seed: of the weights and of the sequences.
        kinds: names in :data:`fusecell.CELLS`.
        updates: of each model's training, instead of its task's own.

    Returns:
        The models, task by task in the order of ``kinds``.

    Raises:
        ValueError: for a name that is not in :data:`fusecell.CELLS`, or of a cell that :class:`PlayCell` doesn't take.
    """
    # All are built before any is trained: a cell that can't be shown is refused at once.
    cells = [(name, kind, _untrained(TASKS[name], zoo_cell(kind), seed)) for name in TASKS for kind in kinds]
    return [_trained(name, kind, cell, seed, updates) for name, kind, cell in cells]


def zoo_cell(name: str) -> ZooCell:
    """Return the entry of :data:`fusecell.CELLS` of a name."""
    for member in CELLS:
        if member.name == name:
            return member
    raise ValueError(f"There is no cell {name!r} in the zoo; expected one of {', '.join(each.name for each in CELLS)}.")


def _untrained(task: Task, member: ZooCell, seed: int) -> PlayCell:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cell = member.make(task.features, task.hidden_size)
        played = PlayCell(cell, nn.Linear(cell.output_size, task.features))
    sizes = {value: place.stop - place.start for value, place in played.values.items()}
    if set(sizes.values()) != {task.hidden_size}:
        raise ValueError(
            f"The page draws cells all of whose values have hidden_size features, {task.hidden_size} here; those of "
            f"{member.name} have {sizes}."
        )
    return played


def _trained(name: str, kind: str, cell: PlayCell, seed: int, updates: int | None) -> Model:
    task, layer, readout = TASKS[name], Recurrent(cell.cell), cell.readout  # the plain cell trains faster
    updates = task.updates if updates is None else updates
    generator = torch.Generator().manual_seed(seed)
    parameters = list(cell.parameters())
    optimizer = torch.optim.Adam(parameters, _LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, updates))
    for _ in range(updates):
        batch = task.batch(generator, False)
        loss = task.loss(readout(layer(batch[:-1])[0]), batch[1:])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        held_out = [task.batch(generator, True) for _ in range(8)]
        losses = [task.loss(readout(layer(batch[:-1])[0]), batch[1:]).item() for batch in held_out]
    return Model(name, kind, cell, sum(losses) / len(losses))
