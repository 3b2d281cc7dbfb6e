"""Samples whose distribution depends on values of the step, written as draws that don't, and arithmetic.

``bernoulli(p)`` is ``rand_like(p) < p``. torch computes each in this way itself: the numbers are the same to the bit,
and so is what is drawn from the generator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["SAMPLING"]


def _bernoulli(input: Tensor, p: float | None = None, *, generator: torch.Generator | None = None) -> Tensor:
    if p is not None or generator is not None:
        return torch.bernoulli(input, *(() if p is None else (p,)), generator=generator)
    return (torch.rand_like(input) < input).to(input.dtype)


def _bernoulli_in_place(tensor: Tensor, p: float | Tensor = 0.5, *, generator: torch.Generator | None = None) -> Tensor:
    if not isinstance(p, Tensor) or generator is not None:
        return tensor.bernoulli_(p, generator=generator)
    # In p's dtype, which torch draws the uniform numbers in.
    return tensor.copy_(torch.empty_like(tensor, dtype=p.dtype).uniform_() < p)


def _normal(
    mean: float | Tensor,
    std: float | Tensor = 1.0,
    size: tuple[int, ...] | None = None,
    *,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Tensor:
    if size is not None or generator is not None or not (isinstance(mean, Tensor) or isinstance(std, Tensor)):
        shape = () if size is None else (size,)
        return torch.normal(mean, std, *shape, generator=generator, **options)
    # As torch has it, with no gradient to either.
    mean, std = (value.detach() if isinstance(value, Tensor) else value for value in (mean, std))
    if isinstance(mean, Tensor) and not isinstance(std, Tensor):
        return torch.empty_like(mean).normal_(0, std) + mean
    return torch.empty_like(torch.as_tensor(mean + std)).normal_() * std + mean


def _multinomial(
    input: Tensor, num_samples: int, replacement: bool = False, *, generator: torch.Generator | None = None
) -> Tensor:
    if generator is not None or (replacement and num_samples > 1):
        return torch.multinomial(input, num_samples, replacement, generator=generator)
    # The largest of p / Exponential(1), which is the Gumbel trick in other words.
    scores = input / torch.empty_like(input).exponential_(1)
    return scores.argmax(-1, keepdim=True) if num_samples == 1 else scores.topk(num_samples).indices


SAMPLING: Mapping[Any, Callable[..., Any]] = {
    torch.bernoulli: _bernoulli,
    Tensor.bernoulli: _bernoulli,
    Tensor.bernoulli_: _bernoulli_in_place,
    torch.normal: _normal,
    torch.multinomial: _multinomial,
    Tensor.multinomial: _multinomial,
}
