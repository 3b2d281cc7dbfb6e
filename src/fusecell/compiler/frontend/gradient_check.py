"""Whether the weights that a step computes have, done again by torch at each call, the gradients that they have in it.

The prologue is the step's ATen calls and custom Functions. A step can do more to a gradient than these: hooks, and
whatever else torch may come to offer. So the two are compared by their numbers, on the cell's own weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusecell.compiler.frontend.recorder import Recorder
from fusecell.compiler.frontend.traced_values import Untraceable
from fusecell.compiler.frontend.weight_prologue import CustomCall, Prologue

__all__ = ["check_gradients"]

_SCALES = (1.0, 1e-4, 1e4)


def check_gradients(recorder: Recorder) -> None:
    """Compare, after a step and before its gradient.

    Raises:
        Untraceable: where a gradient differs, or where a backward does something else to a sum of gradients than to
            its parts: a compiled loop applies it once, to the sum over all steps.
    """
    prologue = recorder.weights.prologue()
    if not prologue.steps:
        return
    hooked = recorder.hooked()
    if hooked is not None:
        raise Untraceable(f"It puts a hook on {hooked}, a value that is made of weights alone.")
    originals = [recorder.weights.slots[slot].tensor for _, slot in prologue.sources]
    tensors = [tensor for tensor in originals if tensor is not None]
    learning = [tensor for tensor in tensors if tensor.requires_grad]
    if learning:
        _compare(recorder, prologue, tensors, learning)


def _compare(recorder: Recorder, prologue: Prologue, originals: Sequence[Tensor], learning: Sequence[Tensor]) -> None:
    again = prologue.slot_values(originals)
    custom = any(isinstance(step.func, CustomCall) for step in prologue.steps)
    generator = torch.Generator().manual_seed(0)
    stored = {slot for _, slot in prologue.sources}
    for leaf in prologue.leaves:
        uses = recorder.uses(leaf.slot)
        if leaf.slot in stored or not uses:
            continue
        name, value = recorder.weights.slots[leaf.slot].name, again[leaf.slot]
        one, other = (torch.randn(value.shape, generator=generator, dtype=value.dtype) for _ in range(2))
        expected = _gradients(uses[0], learning, one)
        for use in uses:
            same = recorder.followed(use) and value.requires_grad
            if not same or not _close(_gradients(use, learning, one), expected):
                raise Untraceable(_differs(name))
        found = _gradients(value, learning, one)
        if not _close(found, expected):
            raise Untraceable(_differs(name))
        if custom and not _is_linear(value, learning, one, other, found):
            raise Untraceable(
                f"It computes {name} by a custom Function whose backward is not linear in the gradient. A compiled "
                "loop would apply it once, to the sum over all steps, where the Python loop applies it at each."
            )


def _differs(name: str) -> str:
    return (
        f"The gradient of {name}, which is made of weights alone, is not that of the operations that make it: a hook "
        "or a custom Function changes it."
    )


def _gradients(value: Tensor, learning: Sequence[Tensor], seed: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(value, learning, seed, retain_graph=True, allow_unused=True))


def _is_linear(
    value: Tensor, learning: Sequence[Tensor], one: Tensor, other: Tensor, expected: Sequence[Tensor | None]
) -> bool:
    """Whether the gradient of a sum is the sum of gradients, small and large."""
    for scale in _SCALES:
        left, right = _gradients(value, learning, scale * other), _gradients(value, learning, one + scale * other)
        total = [None if a is None or b is None else a + b for a, b in zip(left, expected, strict=True)]
        scaled = [None if grad is None else scale * grad for grad in _gradients(value, learning, other)]
        if not _close(right, total) or not _close(left, scaled):
            return False
    return True


def _close(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    return all(_one_close(a, b) for a, b in zip(found, expected, strict=True))


def _one_close(found: Tensor | None, expected: Tensor | None) -> bool:
    if found is None or expected is None:
        # None and zeros are the same gradient.
        value = expected if found is None else found
        return value is None or not value.any()
    largest = expected.detach().abs().nan_to_num().max() if expected.numel() else expected.new_zeros(())
    tolerance = 1e-3 if expected.dtype == torch.float32 else 1e-8
    difference = (found - expected).detach().abs()
    either = found.isnan() == expected.isnan()
    return bool((difference.nan_to_num() <= tolerance * largest).all()) and bool(either.all())
