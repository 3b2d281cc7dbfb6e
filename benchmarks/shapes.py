"""The shapes that are measured: sizes of published models and of the field's own benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["QUICK", "SHAPES", "STEPS", "STREAMS", "USERS", "Mode", "Shape", "pick"]


class Mode(Enum):
    """A kind of call to time; its value is its name on the command line and in the results."""

    INFERENCE = "inference"
    TRAINING = "training"
    STEP = "step"
    STEP_TRAINING = "step-training"
    STREAM = "stream"

    @property
    def training(self) -> bool:
        """Whether a call is a forward and a backward to every parameter, rather than a forward without gradients."""
        return self in (Mode.TRAINING, Mode.STEP_TRAINING)

    @property
    def single(self) -> bool:
        """Whether a call is one step of a cell, rather than a layer over a sequence."""
        return self in (Mode.STEP, Mode.STEP_TRAINING)

    @property
    def title(self) -> str:
        return {
            Mode.INFERENCE: "Inference",
            Mode.TRAINING: "Training: forward and backward",
            Mode.STEP: "One step of a cell, without gradients",
            Mode.STEP_TRAINING: "One step of a cell, forward and backward",
            Mode.STREAM: "Streaming: one step of one row, the state carried over",
        }[self]


@dataclass(frozen=True)
class Shape:
    """The sizes of a layer of one direction over a batch of sequences, or of one step of a cell.

    Attributes:
        cell: the cell's name in ``fusecell.CELLS``.
        steps, batch, inputs, hidden: T, N, input_size, hidden_size.
    """

    cell: str
    steps: int
    batch: int
    inputs: int
    hidden: int

    @property
    def name(self) -> str:
        return f"{self.cell} {self.steps}/{self.batch}/{self.inputs}/{self.hidden}"


SHAPES: tuple[Shape, ...] = (
    Shape("gru", 35, 3, 5, 10),
    Shape("gru", 64, 128, 64, 64),
    Shape("gru", 32, 64, 32, 128),
    Shape("gru", 100, 1, 64, 128),
    Shape("gru", 100, 1, 256, 256),
    Shape("gru", 100, 8, 128, 256),
    Shape("gru", 100, 32, 128, 256),
    Shape("gru", 64, 16, 512, 512),
    Shape("gru", 25, 64, 512, 512),
    Shape("gru", 50, 20, 800, 800),
    Shape("lstm", 128, 2, 512, 128),
    Shape("lstm", 96, 32, 32, 40),
    Shape("rnn_tanh", 100, 32, 64, 128),
    Shape("leaky", 100, 64, 85, 256),
    Shape("gru_layer_norm", 64, 32, 64, 128),
    Shape("ligru", 100, 8, 80, 256),
)
USERS: dict[str, tuple[Shape, ...]] = {
    "Reinforcement learning\nsmall layers, up to 128 rows": (SHAPES[0], SHAPES[1], SHAPES[2]),
    "Audio and control\none or two sequences at a time": (SHAPES[3], SHAPES[4], SHAPES[10]),
    "Speech\n256 to 800 units": SHAPES[5:10],
    "Forecasting\n32 short series": (SHAPES[11], SHAPES[12]),
    "A cell of one's own\nbeside JAX and a Python loop": SHAPES[13:],
}
"""The shapes by who has such layers; each shape once."""
STEPS: tuple[Shape, ...] = (Shape("gru", 1, 1, 5, 10), Shape("gru", 1, 32, 64, 128))
STREAMS: tuple[Shape, ...] = (
    Shape("gru", 1, 1, 1, 16),
    Shape("gru", 1, 1, 40, 128),
    Shape("lstm", 1, 1, 128, 128),
    Shape("gru", 1, 1, 256, 256),
)
QUICK: tuple[Shape, ...] = tuple(Shape(name, 35, 3, 5, 10) for name in dict.fromkeys(shape.cell for shape in SHAPES))


def pick(mode: Mode, only: str | None = None, *, quick: bool = False) -> tuple[Shape, ...]:
    """Return a mode's shapes whose names contain ``only``, if set; a small one of each cell if ``quick``."""
    if mode is Mode.STREAM:
        shapes = STREAMS[:1] if quick else STREAMS
    elif mode.single:
        shapes = STEPS[:1] if quick else STEPS
    else:
        shapes = QUICK if quick else SHAPES
    return tuple(shape for shape in shapes if only is None or only in shape.name)
