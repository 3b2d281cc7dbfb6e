"""Save and resume a training run: tensors in ``checkpoint.safetensors``, all else in ``checkpoint.json``."""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fusecell import __version__
from fusecell.demo.corpus import Corpus
from fusecell.demo.model import build_model
from fusecell.demo.settings import Settings
from fusecell.demo.train import Point, Trainer
from fusecell.errors import quoted
from fusecell.strict_json import parse_json
from fusecell.tensor_file import read_tensor_file

__all__ = ["load_checkpoint", "save_checkpoint"]

_TENSORS, _CONFIG = "checkpoint.safetensors", "checkpoint.json"
_ADAM = ("step", "exp_avg", "exp_avg_sq")
_MOST_CONFIG = 64 << 20  # a curve of a million points takes less
_KINDS = {"settings": dict, "vocabulary": str, "step": int, "seconds": float, "curve": list, "versions": dict}
_POINT = {"seconds": float, "characters": int, "training": float, "held_out": float}
_SIZES = ("embedding_size", "hidden_size", "num_layers", "batch_size", "window")


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
        ValueError: if it was made of another text, its two files are of different steps, or one is damaged.
    """
    if not (folder / _CONFIG).exists() or not (folder / _TENSORS).exists():
        raise FileNotFoundError(f"{folder} holds no checkpoint to resume; run the demo once without --resume.")
    try:
        config = _read_config(folder / _CONFIG)
    except ValueError as error:
        raise ValueError(f"{folder / _CONFIG} is damaged: {error}. Start anew without --resume.") from error
    if config["vocabulary"] != corpus.vocabulary.characters:
        raise ValueError(
            f"the checkpoint in {folder} knows other characters than this Python's standard library has: it was made "
            f"by Python {config['versions']['python']}, this is {platform.python_version()}. Resume with that one."
        )
    try:
        file = read_tensor_file(folder / _TENSORS, ("F32", "F64"))
        step = file.metadata.get("step", "")
        if file.metadata.keys() != {"step"} or not re.fullmatch(r"[0-9]{1,18}", step):
            raise ValueError(f"its metadata are {quoted(file.metadata)}, expected the step")
        if int(step) == config["step"]:
            return _resumed(corpus, config, file.tensors())
    except ValueError as error:
        raise ValueError(f"{folder / _TENSORS} is damaged: {error}. Start anew without --resume.") from error
    raise ValueError(
        f"{folder}: {_TENSORS} is of step {step} and {_CONFIG} of step {config['step']}: an interrupted save. "
        "Start anew without --resume."
    )


def _resumed(corpus: Corpus, config: dict[str, Any], tensors: dict[str, Tensor]) -> Trainer:
    """Build the trainer at the step where it was saved."""
    settings = Settings(**config["settings"])
    _check_tensors(settings, len(corpus.vocabulary), tensors)
    trainer = Trainer.new(settings, corpus.training, len(corpus.vocabulary))
    trainer.model.load_state_dict({name: tensors[f"model.{name}"] for name in trainer.model.state_dict()})
    for name, parameter in trainer.model.named_parameters():
        if f"optimizer.step.{name}" in tensors:
            trainer.optimizer.state[parameter] = {key: tensors[f"optimizer.{key}.{name}"] for key in _ADAM}
    trainer.state = tensors.get("state")
    trainer.step, trainer.seconds = config["step"], float(config["seconds"])
    trainer.curve = [Point(**point) for point in config["curve"]]
    return trainer


def _read_config(path: Path) -> dict[str, Any]:
    """Read the config, or raise ValueError unless its fields have the expected names, types and ranges."""
    if path.stat().st_size > _MOST_CONFIG:
        raise ValueError(f"it has more than {_MOST_CONFIG} bytes")
    config = parse_json(path.read_text(encoding="utf-8"), 3)
    _check_fields("it", config, _KINDS)
    _check_fields("its settings", config["settings"], {name: type(value) for name, value in asdict(Settings()).items()})
    _check_fields("its versions", config["versions"], dict.fromkeys(("python", "torch", "fusecell"), str))
    for point in config["curve"]:
        _check_fields("a point of its curve", point, _POINT)
    wrong = {name: config[name] for name in ("step", "seconds") if not 0 <= config[name] < 1 << 53}
    wrong |= {name: size for name in _SIZES if not 0 < (size := config["settings"][name]) < 1 << 31}
    if not 0 <= config["settings"]["seed"] < 1 << 63:
        wrong["seed"] = config["settings"]["seed"]
    if wrong:
        raise ValueError(f"out of range are {quoted(wrong)}")
    return dict(config)


def _check_fields(subject: str, fields: object, kinds: Mapping[str, type]) -> None:
    """Raise ValueError unless ``fields`` is a dict of exactly these names and types, of finite numbers."""
    if not isinstance(fields, dict) or fields.keys() != kinds.keys():
        raise ValueError(f"{subject} is {quoted(fields)}, expected {', '.join(kinds)}")
    for name, kind in kinds.items():
        value = fields[name]
        # JSON writes 80.0 as 80 in some libraries, so an int passes for a float; a bool for neither.
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{name} of {subject} is {quoted(value)}, expected {kind.__name__}")
        if isinstance(value, float) and not math.isfinite(value) and fields.keys() != _POINT.keys():
            raise ValueError(f"{name} of {subject} is {value}, expected a finite number")


def _check_tensors(settings: Settings, vocabulary: int, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the tensors are those of the settings' model, before a model is allocated."""
    if settings.num_layers > len(tensors):
        raise ValueError(f"{settings.num_layers} layers don't fit {len(tensors)} tensors")
    with torch.device("meta"):
        model = build_model(settings, vocabulary)
    expected = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        if f"optimizer.step.{name}" in tensors:
            like = (torch.empty((), device="meta"), parameter, parameter)
            expected |= {f"optimizer.{key}.{name}": value for key, value in zip(_ADAM, like, strict=True)}
    if "state" in tensors:
        size = (settings.num_layers, settings.batch_size, settings.hidden_size)
        expected["state"] = torch.empty(size, device="meta")
    if tensors.keys() != expected.keys():
        raise ValueError(f"its tensors differ from the model's in {quoted(sorted(tensors.keys() ^ expected.keys()))}")
    for name, like in expected.items():
        value = tensors[name]
        if value.shape != like.shape or value.dtype != like.dtype:
            raise ValueError(
                f"{name} is {value.dtype} of shape {tuple(value.shape)}, expected {like.dtype} of {tuple(like.shape)}"
            )
