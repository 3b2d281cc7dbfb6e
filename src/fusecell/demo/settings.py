"""The demo's hyperparameters."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """Hyperparameters of the demo's model and its training.

    The defaults were the best of thirteen sets, each trained for 50 seconds on one core.

    Arguments:
        layer: the implementation of the GRU, a key of :data:`fusecell.demo.model.LAYERS`.
        embedding_size, hidden_size, num_layers: sizes of the model.
        batch_size: rows of text in a batch.
        window: steps of an update; the state is carried from one window to the next.
        learning_rate: the largest of the schedule.
        warmup: the share of the run in which the learning rate rises.
        clip: the largest norm of the gradient; a larger one is scaled down to it.
        seed: of the weights, the order of the files and the sample.
    """

    layer: str = "fusecell"
    embedding_size: int = 64
    hidden_size: int = 128
    num_layers: int = 2
    batch_size: int = 96
    window: int = 32
    learning_rate: float = 1.2e-2
    warmup: float = 0.05
    clip: float = 1.0
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
