"""Recurrent layers and per-step modules in a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusecell.layers.arguments import Lengths
from fusecell.layers.recurrent import Bidirectional, Recurrent
from fusecell.layers.scan import Input

__all__ = ["Sequential", "detach", "is_recurrent"]


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module takes and returns a state beside its sequence."""
    return isinstance(module, Recurrent | Bidirectional | Sequential | nn.RNNBase)


class Sequential(nn.Sequential):
    """Recurrent layers and per-step modules (Linear, LayerNorm, an activation) in order.

    Example:
        >>> import torch, fusecell as fc
        >>> from torch import nn
        >>> model = fc.Sequential(fc.Recurrent(fc.GRUCell(5, 16)), nn.LayerNorm(16), nn.Linear(16, 2))
        >>> y, (h,) = model(torch.randn(7, 3, 5))
        >>> y.shape, h.shape
        (torch.Size([7, 3, 2]), torch.Size([3, 16]))

    Arguments:
        parts: modules; those that are recurrent get their state, lengths and resets, the others the features alone.
    """

    def forward(
        self,
        input: Input,
        state: Sequence[Any] | None = None,
        *,
        lengths: Lengths | None = None,
        resets: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[Any, ...]]:
        """Run the parts in order.

        Arguments:
            input: as the first part takes it; a PackedSequence goes through per-step modules by its data.
            state: one entry per recurrent part, each in its own form; None for initial states.
            lengths, resets, mask: for every recurrent part, as in :func:`fusecell.scan`.

        Returns:
            The outputs of the last part, and a tuple with one state per recurrent part.

        Raises:
            ValueError: if ``state`` has not one entry per recurrent part.
        """
        count = sum(is_recurrent(part) for part in self)
        states = (None,) * count if state is None else state
        if not isinstance(states, tuple | list) or len(states) != count:
            got = len(states) if isinstance(states, tuple | list) else f"a {type(states).__name__}"
            raise ValueError(f"Sequential has {count} recurrent parts and takes a tuple of as many states, got {got}.")
        value: Any = input
        after: list[Any] = []
        data: dict[str, Any] = {"lengths": lengths, "resets": resets, "mask": mask}
        data = {name: given for name, given in data.items() if given is not None}
        for part in self:
            if is_recurrent(part):
                value, new = part(value, states[len(after)], **data)
                after.append(new)
            elif isinstance(value, PackedSequence):
                value = value._replace(data=part(value.data))
            else:
                value = part(value)
        return value, tuple(after)


def detach(state: Any) -> Any:
    """The same state cut from its history, whatever its form: what truncated backpropagation carries over.

    Example:
        >>> import torch, fusecell as fc
        >>> layer = fc.Recurrent(fc.LSTMCell(5, 10))
        >>> _, state = layer(torch.randn(7, 3, 5))
        >>> y, state = layer(torch.randn(7, 3, 5), fc.detach(state))

    Arguments:
        state: a tensor, None, or any nesting of tuples, lists and dicts of them.
    """
    if state is None:
        return None
    if isinstance(state, Tensor):
        return state.detach()
    if isinstance(state, dict):
        return {key: detach(value) for key, value in state.items()}
    if isinstance(state, tuple | list):
        parts = [detach(value) for value in state]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    raise TypeError(f"detach takes tensors, None and tuples, lists or dicts of them, got {type(state).__name__}.")
