"""Everything that decides how the demo's model is made and trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """The demo's model and training; the defaults were the best of thirteen tried, at 50 seconds on one core.

    Arguments:
        layer: whose GRU is trained, a key of :data:`fusecell.demo.model.LAYERS`.
        embedding_size, hidden_size, num_layers: the model.
        batch_size: rows of text read side by side.
        window: characters of each row between two updates; the state is carried from window to window.
        learning_rate: the peak of the schedule.
        warmup: the share of the run in which the learning rate rises.
        clip: the largest norm of the gradient.
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
