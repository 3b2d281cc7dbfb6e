"""``Ensemble``: several models of one architecture, whose weights are stacked and which run in one call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils.rnn import PackedSequence

from fusecell.execution.call_form import PreparedArguments
from fusecell.execution.call_path import call
from fusecell.execution.natively import natively
from fusecell.layers.sequential import Sequential
from fusecell.torch_internals import has_hooks

__all__ = ["Ensemble"]


class Ensemble(nn.Module):
    r"""Several models of one architecture as one module, whose parameters have a first dimension for the members.

    .. math:: y_k = f(x; W_k) \qquad k = 1 \dots K

    Each member is made on its own, so that each begins with weights of its own; optimisers, ``state_dict`` and
    ``to`` see one module with the member's names. Each member's numbers have the bits that it has alone, in float32 and
    float64; those of 16-bit layers are the Python loop's. Layers of fusecell run their kernels for all members side by
    side, on torch's threads; whatever else there is runs under ``torch.vmap`` over the weights. What is no parameter
    and no buffer of a member, all have from the first.

    Example:
        >>> import torch, fusecell as fc
        >>> models = fc.Ensemble(lambda: fc.Sequential(fc.GRU(3, 8), torch.nn.Linear(8, 2)), 5)
        >>> x = torch.randn(20, 4, 3)
        >>> y, state = models(x)
        >>> y.shape, models.stacked.get_parameter("1.weight").shape
        (torch.Size([5, 20, 4, 2]), torch.Size([5, 2, 8]))
        >>> disagreement = y.std(0)
        >>> bool((models.member(2)(x)[0] == y[2]).all())
        True

    Arguments:
        make: returns a new member each time it is called; or the members, a sequence of modules.
        size: how many members to make; left out where the members are given.

    Attributes:
        size: the number of members.
        stacked: a module like a member, whose parameters and buffers are those of all, (K, ...).

    Raises:
        ValueError: for no members, or members that differ in the names, shapes or dtypes of their parameters.
        TypeError: if ``make`` returns no module.
    """

    def __init__(self, make: Callable[[], nn.Module] | Sequence[nn.Module], size: int | None = None) -> None:
        super().__init__()
        members = _members(make, size)
        self.size = len(members)
        first, *others = [_signature(member) for member in members]
        for number, other in enumerate(others, 1):
            if other != first:
                name = next(name for name in {**first, **other} if first.get(name) != other.get(name))
                raise ValueError(
                    f"Ensemble: members have the same parameters and buffers; {name} is {first.get(name)} in member 0 "
                    f"and {other.get(name)} in member {number}."
                )
        self.stacked = copy.deepcopy(members[0])
        _exchange(self.stacked, lambda name, _: torch.stack([_value(member, name).detach() for member in members]))

    def forward(self, x: Any, *states: Any, each: bool = False, **options: Any) -> Any:
        """Run all members.

        Arguments:
            x: the input of a member, the same for all; with ``each`` one for every member, behind a first dimension.
                A tuple of tensors where a member takes several.
            states: further positional arguments of a member, as first states: a first dimension for the members, as
                the states have that a call returns; None.
            each: whether every member has an input of its own.
            options: keyword arguments of a member, as ``lengths``, the same for all.

        Returns:
            What a member returns, each tensor with the members first: (K, T, N, features).

        Raises:
            ValueError: if a tensor that has a first dimension for the members has another size there.
        """
        for name, value in (("x", x if each else None), *(("a state", state) for state in states)):
            _check_members(name, value, self.size)
        return self._run(self.stacked, x, states, each, options)

    def _run(self, module: nn.Module, x: Any, states: tuple[Any, ...], each: bool, options: dict[str, Any]) -> Any:
        """Run all members of a module, or of a part of one."""
        if type(module) is Sequential and not (has_hooks(module) or isinstance(x, PackedSequence)):
            return module.run_parts(partial(self._run_part, each), x, *states, **options)
        prepared = self._prepared(module, x, each) if len(states) < 2 and not options else None
        if prepared is None:
            return self._mapped(module, x, states, each, options)
        # As vmap does it, but without its Python, from the second such call on: the cell has all members' weights.
        form = prepared.form._replace(members=self.size, each=each)
        state = states[0] if states else None
        return call(prepared.owner, x, state, form, _mapped_call, (self, module, each), prepared.factory)

    def _run_part(self, each: bool, place: int, part: nn.Module, x: Any, *states: Any, **options: Any) -> Any:
        """Run all members of a part of a Sequential; from the second on each has an input of its own."""
        each = each or place > 0
        if not each and not any(True for _ in _places(part)):  # nothing tells the members apart
            x, each = x.expand(self.size, *x.shape), True
        return self._run(part, x, tuple([state for state in states if state is not None]), each, options)

    @natively
    def _prepared(self, module: nn.Module, x: Any, each: bool) -> PreparedArguments | None:
        """Return how a call of a member is prepared, where the members are layers whose call is one kernel."""
        prepared_call = getattr(module, "prepared_call", None)
        if prepared_call is None or torch.compiler.is_compiling() or has_hooks(module):
            return None
        first = x[0] if isinstance(x, tuple | list) and x else x
        if not isinstance(first, Tensor):
            return None
        result: PreparedArguments | None = prepared_call(x, first.dim() - each)
        return result

    def _mapped(self, module: nn.Module, x: Any, states: tuple[Any, ...], each: bool, options: dict[str, Any]) -> Any:
        """Run all members by ``torch.vmap``."""
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())

        def run(tensors: dict[str, Tensor], x: Any, *states: Any) -> Any:
            return functional_call(module, tensors, (x, *states), options)

        in_dims = (0, 0 if each else None, *(None if state is None else 0 for state in states))
        return vmap(run, in_dims=in_dims, randomness="different")(tensors, x, *states)

    def member(self, number: int) -> nn.Module:
        """Return one member by itself, with a copy of its weights.

        Raises:
            IndexError: if there is no such member.
        """
        if not -self.size <= number < self.size:
            raise IndexError(f"Ensemble has {self.size} members, got the number {number}.")
        member = copy.deepcopy(self.stacked)
        _exchange(member, lambda _, value: value.detach()[number].clone())
        return member

    def __iter__(self) -> Iterator[nn.Module]:
        """Iterate over the members, each as of :meth:`member`."""
        return map(self.member, range(self.size))

    def __len__(self) -> int:
        return self.size

    def extra_repr(self) -> str:
        return f"size={self.size}"


def _mapped_call(owner: Any, x: Any, state: Any, ensemble: Ensemble, module: nn.Module, each: bool) -> Any:
    return ensemble._mapped(module, x, () if state is None else (state,), each, {})


def _members(make: Callable[[], nn.Module] | Sequence[nn.Module], size: int | None) -> list[nn.Module]:
    if isinstance(make, Sequence | nn.ModuleList):
        if size is not None and size != len(make):
            raise ValueError(f"Ensemble got {len(make)} members and the size {size}.")
        members = list(make)
    else:
        if isinstance(make, nn.Module) or not callable(make):
            raise TypeError(
                f"Ensemble takes a function that makes a member, or a list of members, got {type(make).__name__}: "
                "write fc.Ensemble(lambda: fc.GRU(3, 8), 5)."
            )
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"Ensemble takes the number of members, got {size!r}.")
        members = [make() for _ in range(size)]
    if not members:
        raise ValueError("Ensemble takes one member at least.")
    for member in members:
        if not isinstance(member, nn.Module):
            raise TypeError(f"Ensemble takes modules as members, got {type(member).__name__}.")
    return members


def _signature(member: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and dtype of every parameter and buffer, by name."""
    return {name: (tuple(table[key].shape), table[key].dtype) for name, table, key in _places(member)}


def _places(module: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Iterate over the parameters and buffers of a module: its name, the table that it is in, and its name there.

    One that several modules share comes once for each.
    """
    for path, owner in module.named_modules():
        for table in (owner._parameters, owner._buffers):
            for key, value in table.items():
                if value is not None:
                    yield f"{path}.{key}" if path else key, table, key


def _exchange(module: nn.Module, new: Callable[[str, Tensor], Tensor]) -> None:
    """Put other parameters and buffers into a module; what several modules share they share afterwards."""
    exchanged: dict[int, Tensor] = {}
    old = []
    for name, table, key in list(_places(module)):
        value = table[key]
        if id(value) not in exchanged:
            result = new(name, value)
            if isinstance(value, nn.Parameter):
                result = nn.Parameter(result, requires_grad=value.requires_grad)
            exchanged[id(value)] = result
            old.append(value)  # keeps its id
        # Not register_parameter: a layer may check the shapes of what it is given.
        table[key] = exchanged[id(value)]


def _value(module: nn.Module, name: str) -> Tensor:
    path, _, key = name.rpartition(".")
    owner = module.get_submodule(path)
    value: Tensor | None = owner._parameters.get(key)
    if value is None:
        value = owner._buffers.get(key)
    if value is None:
        raise ValueError(f"Ensemble: a member has no {name}, which another has.")
    return value


def _check_members(name: str, value: Any, size: int) -> None:
    if isinstance(value, list | tuple):
        for each in value:
            _check_members(name, each, size)
    elif isinstance(value, Tensor) and (value.dim() == 0 or value.shape[0] != size):
        raise ValueError(
            f"Ensemble has {size} members, and {name} of shape {tuple(value.shape)}: its first dimension is that of "
            "the members. An input that all have in common goes without each=True."
        )
