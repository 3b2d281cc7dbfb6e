"""Save and resume a training run: tensors in ``checkpoint.safetensors``, all else in ``checkpoint.json``."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fusecell import __version__
from fusecell.demo.corpus import Corpus
from fusecell.demo.settings import Settings
from fusecell.demo.train import Point, Trainer

__all__ = ["load_checkpoint", "save_checkpoint"]

_TENSORS, _CONFIG = "checkpoint.safetensors", "checkpoint.json"
_ADAM = ("step", "exp_avg", "exp_avg_sq")


def save_checkpoint(trainer: Trainer, corpus: Corpus, folder: Path) -> None:
    """Write all that :func:`load_checkpoint` needs to continue with the same numbers as without a stop."""
    tensors = {f"model.{name}": value for name, value in trainer.model.state_dict().items()}
    for name, parameter in trainer.model.named_parameters():
        # By the parameters' names: Adam itself numbers them.
        for key, value in trainer.optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    if trainer.state is not None:
        tensors["state"] = trainer.state
    config = {
        "settings": trainer.settings.to_dict(),
        "vocabulary": corpus.vocabulary.characters,
        "step": trainer.step,
        "seconds": trainer.seconds,
        "curve": [asdict(point) for point in trainer.curve],
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "fusecell": __version__},
    }
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
    save_file(plain, folder / f"{_TENSORS}.new", {"step": str(trainer.step)})
    (folder / f"{_CONFIG}.new").write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
    # Renamed when both are complete, so that an interruption leaves the previous checkpoint in place.
    for name in (_TENSORS, _CONFIG):
        os.replace(folder / f"{name}.new", folder / name)


def load_checkpoint(corpus: Corpus, folder: Path) -> Trainer:
    """Load the run that was saved in ``folder``, at the step where it was saved.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if its text has other characters than ``corpus``, or its two files are of different steps.
    """
    if not (folder / _CONFIG).exists() or not (folder / _TENSORS).exists():
        raise FileNotFoundError(f"{folder} holds no checkpoint to resume; run the demo once without --resume.")
    config: dict[str, Any] = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    if config["vocabulary"] != corpus.vocabulary.characters:
        raise ValueError(
            f"the checkpoint in {folder} knows other characters than this Python's standard library has: it was made "
            f"by Python {config['versions']['python']}, this is {platform.python_version()}. Resume with that one."
        )
    with safe_open(folder / _TENSORS, framework="pt") as file:
        step = file.metadata()["step"]
        # Cloned: a tensor in a mapped file may be unaligned, and torch's vector code then rounds differently.
        tensors: dict[str, Tensor] = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if int(step) != config["step"]:
        raise ValueError(
            f"{folder}: {_TENSORS} is of step {step} and {_CONFIG} of step {config['step']}: an interrupted save. "
            "Start anew without --resume."
        )
    trainer = Trainer.new(Settings(**config["settings"]), corpus.training, len(corpus.vocabulary))
    trainer.model.load_state_dict({name: tensors[f"model.{name}"] for name in trainer.model.state_dict()})
    for name, parameter in trainer.model.named_parameters():
        if f"optimizer.step.{name}" in tensors:
            trainer.optimizer.state[parameter] = {key: tensors[f"optimizer.{key}.{name}"] for key in _ADAM}
    trainer.state = tensors.get("state")
    trainer.step, trainer.seconds = config["step"], config["seconds"]
    trainer.curve = [Point(**point) for point in config["curve"]]
    return trainer
