"""Check the weight prologue's gradients: what is computed once from weights must learn as it does in the step.

The prologue consists of the step's ATen calls and custom Functions. A step can change a gradient by other means: hooks,
and whatever else torch may come to offer. So the gradients of the two are compared by numbers, on the cell's weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusecell.compiler.frontend.recorder import Recorder
from fusecell.compiler.frontend.traced_values import Untraceable
from fusecell.compiler.frontend.weight_prologue import CustomCall, Prologue

__all__ = ["check_gradients"]

# A backward that clips is linear for small gradients, one that rounds is nearly so for large ones.
_SCALES = (1.0, 1e-4, 1e4)
# Relative to the largest element. A custom backward rounds at each of its operations.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def check_gradients(recorder: Recorder) -> None:
    """Compare the gradients of all computed weights, after the step was recorded and before its backward.

    Raises:
        Untraceable: where a gradient differs, or where a backward does something else to a sum of gradients than to
            its parts: a compiled loop applies it once, to the sum over all steps.
    """
    prologue = recorder.weights.prologue()
    if not prologue.steps:
        return
    hooked = recorder.hooked_weight()
    if hooked is not None:
        raise Untraceable(f"The step registers a hook on {hooked}, a value that is computed from weights alone.")
    originals = [recorder.weights.slots[slot].tensor for _, slot in prologue.sources]
    tensors = [tensor for tensor in originals if tensor is not None]
    trainable = [tensor for tensor in tensors if tensor.requires_grad]
    if trainable:
        _compare(recorder, prologue, tensors, trainable)


def _compare(recorder: Recorder, prologue: Prologue, originals: Sequence[Tensor], trainable: Sequence[Tensor]) -> None:
    slots = prologue.slot_values(originals)
    custom = any(isinstance(step.func, CustomCall) for step in prologue.steps)
    generator = torch.Generator().manual_seed(0)
    stored = {slot for _, slot in prologue.sources}
    for leaf in prologue.leaves:
        uses = recorder.uses(leaf.slot)
        if leaf.slot in stored or not uses:
            continue
        name, value = recorder.weights.slots[leaf.slot].name, slots[leaf.slot]
        one, other = (torch.randn(value.shape, generator=generator, dtype=value.dtype) for _ in range(2))
        expected = _gradients(uses[0], trainable, one)
        for use in uses:
            is_followed = recorder.is_in_prologue(use) and value.requires_grad
            if not is_followed or not _close(_gradients(use, trainable, one), expected):
                raise Untraceable(_difference(name))
        gradients = _gradients(value, trainable, one)
        if not _close(gradients, expected):
            raise Untraceable(_difference(name))
        if custom and not _is_linear(value, trainable, one, other, gradients):
            raise Untraceable(
                f"The step computes {name} by a custom Function whose backward is not linear in the gradient. A "
                "compiled loop would apply it once, to the sum over all steps, where the Python loop applies it at "
                "each."
            )


def _difference(name: str) -> str:
    return (
        f"The gradient of {name}, which is computed from weights alone, is not that of the operations that compute it: "
        "a hook or a custom Function changes it."
    )


def _gradients(value: Tensor, trainable: Sequence[Tensor], seed: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(value, trainable, seed, retain_graph=True, allow_unused=True))


def _is_linear(
    value: Tensor, trainable: Sequence[Tensor], one: Tensor, other: Tensor, expected: Sequence[Tensor | None]
) -> bool:
    """Whether the gradient of a sum is the sum of gradients, small and large."""
    for scale in _SCALES:
        left, right = _gradients(value, trainable, scale * other), _gradients(value, trainable, one + scale * other)
        total = [None if a is None or b is None else a + b for a, b in zip(left, expected, strict=True)]
        scaled = [None if grad is None else scale * grad for grad in _gradients(value, trainable, other)]
        if not _close(right, total) or not _close(left, scaled):
            return False
    return True


def _close(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    return all(_one_close(a, b) for a, b in zip(actual, expected, strict=True))


def _one_close(actual: Tensor | None, expected: Tensor | None) -> bool:
    if actual is None or expected is None:
        # None and zeros are the same gradient.
        value = expected if actual is None else actual
        return value is None or not value.any()
    # Relative to the largest element: single ones may be differences that cancel.
    largest = expected.detach().abs().nan_to_num().max() if expected.numel() else expected.new_zeros(())
    tolerance = _TOLERANCES.get(expected.dtype, 1e-8)
    difference = (actual - expected).detach().abs()
    same_nan = actual.isnan() == expected.isnan()
    return bool((difference.nan_to_num() <= tolerance * largest).all()) and bool(same_nan.all())
