"""Activation functions by name, for the cells' ``activation`` arguments."""

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
"""Elementwise functions by their names in torch; keys are what ``activation=`` accepts."""


def check_activation(where: str, **activations: str) -> None:
    """Raise ValueError unless every argument names an activation.

    Arguments:
        where: the class, for the error's text.
        activations: the value of each argument by the argument's name.
    """
    for argument, name in activations.items():
        if name not in ACTIVATIONS:
            raise ValueError(f"{where}: {argument} must be one of {', '.join(ACTIVATIONS)}, got {name!r}.")
