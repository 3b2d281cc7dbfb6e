"""Train DeepFilterNet 3, a speech enhancer, with fusecell: one line after the model is made.

pip install fusecell deepfilternet loguru torchaudio
python examples/recipes/deepfilternet.py
"""

from __future__ import annotations

import importlib.util
import sys
import types

import torch
from side_by_side import Step, compare
from torch import nn

import fusecell as fc


def enhancer() -> nn.Module:
    """Return the model with random weights: three GRUs of 256 units among convolutions."""
    import torchaudio  # noqa: F401  # by whose absence the next line would fail otherwise

    # From 2.9 on; deepfilternet reads one name there.
    if "torchaudio.backend" not in sys.modules and importlib.util.find_spec("torchaudio.backend") is None:
        for name in ("torchaudio.backend", "torchaudio.backend.common"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["torchaudio.backend.common"].AudioMetaData = object  # type: ignore[attr-defined]
    from df.config import config

    config.use_defaults(allow_reload=True)
    from df.deepfilternet3 import init_model

    model: nn.Module = init_model()
    return model


def program(fusecell: bool, small: bool) -> Step:
    """Learn to keep a spectrum as it is, from its 32 bands and the lowest 96 of its 481 frequencies."""
    rows, frames = (1, 7) if small else (2, 200)
    model = enhancer()
    if fusecell:
        fc.replace(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    spectrum = torch.randn(rows, 1, frames, 481, 2)
    bands = spectrum[:, :, :, :480].square().sum(-1).unflatten(-1, (32, 15)).mean(-1).log()
    lowest = spectrum[:, :, :, :96]

    def step() -> float:
        enhanced = model(spectrum.clone(), bands, lowest)[0]
        loss = (enhanced - spectrum).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


if __name__ == "__main__":
    compare(program)
