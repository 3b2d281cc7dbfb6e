"""``Sequential``, recurrent layers and per-step modules in a row, and ``detach``, for the states it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusecell.execution.symbolic_trace import is_proxy, record_call
from fusecell.layers.arguments import Lengths
from fusecell.layers.recurrent import Bidirectional, Recurrent
from fusecell.layers.scan import Input

__all__ = ["Sequential", "detach", "is_recurrent"]


def is_recurrent(module: nn.Module) -> bool:
    """Return whether a module takes a state and returns one, in addition to its sequence."""
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
        parts: modules; recurrent ones get their state, lengths, resets and mask, the others only the features.
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
            input: as the first part takes it; per-step modules are applied to the data of a PackedSequence.
            state: one entry per recurrent part, each as that part takes it; None for initial states.
            lengths, resets, mask: for every recurrent part, as in :func:`fusecell.scan`.

        Returns:
            The outputs of the last part, and a tuple with one state per recurrent part.

        Raises:
            ValueError: if ``state`` doesn't have one entry per recurrent part.
        """
        if type(input) is not Tensor and is_proxy(input):
            return record_call(self, input, state, lengths=lengths, resets=resets, mask=mask)  # type: ignore[no-any-return]
        return self.run_parts(None, input, state, lengths, resets, mask)

    def run_parts(
        self,
        run: Callable[..., Any] | None,
        input: Any,
        state: Sequence[Any] | None = None,
        lengths: Lengths | None = None,
        resets: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Any, tuple[Any, ...]]:
        """Run the parts in order, each by a function; otherwise as ``forward``.

        Arguments:
            run: called with a part's place, the part, and what it is to be called with; None to call the part itself.
        """
        count = sum(is_recurrent(part) for part in self)
        states = (None,) * count if state is None else state
        if not isinstance(states, tuple | list) or len(states) != count:
            got = len(states) if isinstance(states, tuple | list) else f"a {type(states).__name__}"
            raise ValueError(f"Sequential has {count} recurrent parts and takes a tuple of as many states, got {got}.")
        value: Any = input
        after: list[Any] = []
        data: dict[str, Any] = {"lengths": lengths, "resets": resets, "mask": mask}
        # Only those that were passed: torch.nn's own layers, which may be parts, take none of them.
        data = {name: value for name, value in data.items() if value is not None}
        for place, part in enumerate(self):
            if is_recurrent(part):
                start = states[len(after)]
                value, new = run(place, part, value, start, **data) if run else part(value, start, **data)
                after.append(new)
            elif isinstance(value, PackedSequence):
                value = value._replace(data=run(place, part, value.data) if run else part(value.data))
            else:
                value = run(place, part, value) if run else part(value)
        return value, tuple(after)


def detach(state: Any) -> Any:
    """Detach a state of any structure from autograd's graph, for truncated backpropagation.

    Example:
        >>> import torch, fusecell as fc
        >>> layer = fc.Recurrent(fc.LSTMCell(5, 10))
        >>> _, state = layer(torch.randn(7, 3, 5))
        >>> y, state = layer(torch.randn(7, 3, 5), fc.detach(state))

    Arguments:
        state: a tensor, None, or any nesting of tuples, lists and dicts of them.

    Returns:
        The same structure of detached tensors, which share the memory of the old ones.

    Raises:
        TypeError: for anything else in it.
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
