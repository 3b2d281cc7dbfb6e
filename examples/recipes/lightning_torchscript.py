"""Train a LightningModule with fusecell's layers, and save it as TorchScript that needs no fusecell.

pip install fusecell lightning
python examples/recipes/lightning_torchscript.py
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from side_by_side import Step, compare
from torch import nn

import fusecell as fc


def classifier(features: int, units: int, classes: int) -> Any:
    """Return somebody's LightningModule: two layers of LSTM and a head over the last step."""
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.LSTM(features, units, num_layers=2, batch_first=True)
            self.head = nn.Linear(units, classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y, _ = self.encoder(x)
            return self.head(y[:, -1])

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            x, label = batch
            loss = nn.functional.cross_entropy(self(x), label)
            self.log("loss", loss, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    return Classifier()


def program(fusecell: bool, small: bool) -> Step:
    """Tell which feature has the largest sum; a step is a fit over an epoch."""
    import lightning

    rows, steps, features, units = (32, 9, 5, 7) if small else (512, 60, 16, 64)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    model = classifier(features, units, features)
    if fusecell:
        fc.replace(model)
    x = torch.randn(rows, steps, features)
    data = torch.utils.data.TensorDataset(x, x.sum(1).argmax(1))
    loader = torch.utils.data.DataLoader(data, batch_size=rows // 4)

    def step() -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few workers, of a logger that is off
            trainer = lightning.Trainer(
                max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False,
            )  # fmt: skip
            trainer.fit(model, loader)
        return float(trainer.callback_metrics["loss"])

    return step


def scripted(fusecell: bool) -> torch.jit.ScriptModule:
    """Return a model as TorchScript; its LSTM is torch.nn's, whichever the model has."""
    model = classifier(5, 7, 5).eval()
    if fusecell:
        fc.replace(model)
    script: torch.jit.ScriptModule = model.to_torchscript()
    return script


def main() -> None:
    """Compare, and write a file."""
    compare(program, 6)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        scripted(True).save(path)
        print(f"saved as TorchScript: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
