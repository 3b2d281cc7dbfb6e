"""The activations that cells take by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "check_activation"]


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "gelu": F.gelu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "identity": _identity,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "relu": torch.relu,
    "relu6": F.relu6,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sin": torch.sin,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "tanh": torch.tanh,
}
"""By the names they have in torch."""


def check_activation(where: str, **given: str) -> None:
    """Raise ValueError for the name of an activation that there is not."""
    for argument, name in given.items():
        if name not in ACTIVATIONS:
            raise ValueError(f"{where}: {argument} must be one of {', '.join(ACTIVATIONS)}, got {name!r}.")
