"""The recorder: sees every ATen call of a step and of its gradient, and writes what it does into a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusecell.compiler.frontend.aten_arguments import Key, key_of, mapped, tensors_in, values_in
from fusecell.compiler.frontend.custom_functions import is_custom_node, is_of_operator, plain_arguments, tensor_results
from fusecell.compiler.frontend.graph_writer import Writer
from fusecell.compiler.frontend.isolation import users_line
from fusecell.compiler.frontend.rules.backward import BACKWARD, SUMS
from fusecell.compiler.frontend.rules.movement import CONSTANTS, KEEPS, MOVES, PRODUCTS, filled
from fusecell.compiler.frontend.rules.pointwise import POINTWISE
from fusecell.compiler.frontend.rules.reduction import REDUCTIONS
from fusecell.compiler.frontend.traced_values import ExternalGrad, Row, Sum, Unsupported, Untraceable, Value, Weight
from fusecell.compiler.frontend.weight_prologue import CustomCall, Ref, Weights, weight_views
from fusecell.compiler.ir.graph import Builder

__all__ = ["MOST_NODES", "RULES", "Recorder"]

RULES = {**POINTWISE, **REDUCTIONS, **PRODUCTS, **BACKWARD}
_NUMBERS = (torch.bool, torch.int64)
MOST_NODES = 25_000
"""Values of a step and its gradient, beyond which it isn't compiled: that would take minutes."""

_DRAWS = "It draws random numbers; draw them in Cell.draw, which is called once per sequence."
_STALE = "It changes a tensor in place while a view of it, or a tensor that it is a view of, is still in use."


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch annotates it in part
    """Runs a step's ATen calls and records them.

    A tensor is known by where its elements lie, not by its object: what autograd saved comes back as a new one. So
    that no memory is used twice, every tensor seen is kept until the trace ends.

    Arguments:
        builder: the graph to write into.
        rows: the number of rows of the inputs; no other dimension has it.
        dtype: what the step computes in.
        sources: the path of each parameter, buffer and attribute of the cell, by ``id``.
    """

    def __init__(self, builder: Builder, rows: int, dtype: torch.dtype, sources: dict[int, tuple[str, Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.builder = builder
        self.dtype = dtype
        self.sources = sources
        self.weights = Weights(builder, dtype)
        self.writer = Writer(builder, rows, self.weights.leaf)
        self.backward = False
        self.gradients: dict[int, Value] = {}
        self._values: dict[Key, Value] = {}
        self._by_storage: dict[int, set[Key]] = {}
        self._fixed: set[int] = {tensor.untyped_storage()._cdata for _, tensor in sources.values()}
        self._kept: list[Tensor] = []
        # Of each slot, the tensors that stand for it and have a gradient, by where they are in autograd's graph.
        self._edges: dict[int, dict[tuple[Any, int], Tensor]] = {}
        self._own_nodes: set[Any] = set()
        """The nodes of Functions and operators that the prologue applies as the step did."""
        self._inside: tuple[frozenset[int], set[int]] | None = None
        """While a Function is applied that is one step of the prologue: its arguments' memory, and what it made."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would import torch._dynamo, a second's work, to guard a compilation that doesn't happen here.
        return False

    # what a tensor stands for

    def know(self, tensor: Tensor, value: Value, *, fixed: bool = False) -> None:
        """From now on ``tensor`` stands for ``value``; a ``fixed`` one must not be written to."""
        key = key_of(tensor)
        self._values[key] = value
        self._by_storage.setdefault(key[0], set()).add(key)
        self._kept.append(tensor)
        if fixed:
            self._fixed.add(key[0])

    def value(self, tensor: Tensor) -> Value:
        """What a tensor stands for.

        Raises:
            Untraceable: for a tensor that came from nowhere.
        """
        found = self._values.get(key_of(tensor))
        if found is None:
            found = self._source(tensor)
        if isinstance(found, Weight) and tensor.grad_fn is not None and not self.backward:
            self._edges.setdefault(found.slot, {}).setdefault((tensor.grad_fn, tensor.output_nr), tensor)
        return found

    def _source(self, tensor: Tensor) -> Value:
        path, source = self.sources.get(id(tensor), ("", tensor))
        if not path:
            shape = tuple(tensor.shape)
            return Unsupported(
                shape,
                f"It uses a tensor of shape {shape} that is neither an input, a state, a parameter, a buffer or an "
                "attribute of the cell nor made in the step; keep it on the cell with register_buffer.",
            )
        self.know(source, self.weights.source(path, source), fixed=True)
        return self._values[key_of(source)]

    def is_known(self, tensor: Tensor) -> bool:
        return key_of(tensor) in self._values

    # custom Functions

    def on_apply(self, function: type[Any], args: Sequence[Any], apply: Callable[..., Any]) -> Any:
        """A Function that the step applies: to weights alone it is one step of the prologue.

        One that sees rows is followed through its operations; its backward, which autograd runs, likewise.
        """
        tensors = list(tensors_in(args))
        if self._inside is not None or not tensors or not all(isinstance(self.value(t), Weight) for t in tensors):
            return apply(*args)
        if is_of_operator(function):
            with self.weights.as_outside():
                result = apply(*args)
            self._own_nodes.update(value.grad_fn for value in tensors_in([result]))
            return result
        plain_arguments(function, args)
        refs = [mapped(arg, self._ref_of, "") for arg in args]
        self._inside = frozenset(tensor.untyped_storage()._cdata for tensor in tensors), set()
        try:
            result = apply(*args)
            results = tensor_results(function, result)
            self._own_nodes.update(value.grad_fn for value in results if value is not None)
            # A tensor is known by its memory: what a Function hands on untouched, and yet with a gradient of its own,
            # gets memory of its own.
            storages: set[int] = {tensor.untyped_storage()._cdata for tensor in tensors}
            for index, value in enumerate(results):
                if value is not None and value.untyped_storage()._cdata in storages:
                    results[index] = value = value.clone()
                if value is not None:
                    storages.add(value.untyped_storage()._cdata)
        finally:
            self._inside = None
        if any(value is not None and self.writer.rows in value.shape for value in results):
            raise Untraceable(f"{function.__name__} makes rows of a weight{users_line()}.")
        weights = self.weights.record_function(CustomCall(function), refs, results)
        for tensor, weight in zip([value for value in results if value is not None], weights, strict=True):
            self.know(tensor, weight)
        return tuple(results) if isinstance(result, tuple | list) else results[0]

    def _call_inside(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call inside a Function that is one step of the prologue: made, not recorded."""
        assert self._inside is not None
        given, made = self._inside
        if torch.Tag.nondeterministic_seeded in func.tags and not _certain(func, args, kwargs):
            raise Untraceable(_DRAWS)
        tensors = list(tensors_in([*args, *kwargs.values()]))
        storages = {tensor.untyped_storage()._cdata for tensor in tensors}
        if not storages <= given | made and not func._schema.name.endswith("::lift_fresh"):
            raise Untraceable("It applies a custom Function that reads a tensor beside its arguments; hand it over.")
        if any(target.untyped_storage()._cdata in given for target in _written(func, args, kwargs)):
            raise Untraceable("It applies a custom Function that changes a weight in place; return a new tensor.")
        result = func(*args, **kwargs)
        results = [result] if isinstance(result, Tensor) else result
        if not isinstance(results, list | tuple):
            raise Untraceable("It reads the value of a tensor.")
        for tensor in tensors_in(results):
            made.add(tensor.untyped_storage()._cdata)
            self._kept.append(tensor)
        return result

    def followed(self, tensor: Tensor) -> bool:
        """Whether the way a weight's value was made is one that the prologue goes too."""
        return not is_custom_node(tensor.grad_fn) or tensor.grad_fn in self._own_nodes

    def uses(self, slot: int) -> list[Tensor]:
        """The tensors with a gradient that stand for a slot."""
        return list(self._edges.get(slot, {}).values())

    def hooked(self) -> str | None:
        """The name of a computed weight that the step has put a hook on."""
        for tensor in self._kept:
            if tensor._backward_hooks:
                value = self._values.get(key_of(tensor))
                if isinstance(value, Weight):
                    return self.weights.slots[value.slot].name
        return None

    # recording

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.backward:
            # The guard against reading values is in force there for the user's code, not for this.
            with torch._C.DisableTorchFunction():
                return self._dispatch(func, args, kwargs or {})
        return self._dispatch(func, args, kwargs or {})

    def _dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.partition("::")[2]
        try:
            if self._inside is not None:
                return self._call_inside(func, args, kwargs)
            target = self._check(func, args, kwargs)
            stale = self._stale(target)
            # Read before the call: what is written in place has its old value here.
            values = mapped(args, self.value, name)
            options = mapped(kwargs, self.value, name)
            result = func(*args, **kwargs)
            for key in stale:
                self._values[key] = Unsupported(key[2], _STALE)
            # Tensors of our own, such as index tables, may be read: only the step may not.
            with torch._C.DisableTorchFunction():
                self._record(func, name, args, values, options, result, target)
        except Untraceable as refusal:
            raise Untraceable(self._located(refusal, name)) from None
        return result

    def _located(self, refusal: Untraceable, name: str) -> str:
        text = str(refusal)
        if " [aten" in text:
            return text
        place = users_line()
        if self.backward:
            node = torch._C._current_autograd_node()
            place = f" in the gradient of {node.name()}" if node is not None else ""
        return f"{text.removesuffix('.')} [aten.{name}{place}]."

    def _check(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Refuse an effect before it happens; returns the tensor that the call writes to, if any."""
        if torch.Tag.nondeterministic_seeded in func.tags and not _certain(func, args, kwargs):
            raise Untraceable(_DRAWS)
        if not func._schema.is_mutable:
            return None
        written = _written(func, args, kwargs)
        for target in written:
            if not isinstance(target, Tensor):
                raise Untraceable("It writes to several tensors at once.")
            if isinstance(self.value(target), Unsupported) and not self.is_known(target):
                raise Untraceable(
                    f"It changes in place a tensor of shape {tuple(target.shape)} that is neither made in the step nor "
                    "a parameter, buffer or attribute of the cell; compute a new tensor, and return it as a state if "
                    "it is to be there at the next step."
                )
            if target.untyped_storage()._cdata in self._fixed:
                raise Untraceable(self._fixed_reason(target))
        if len(written) != 1:
            raise Untraceable("It writes to several tensors at once.")
        only: Tensor = written[0]
        return only

    def _fixed_reason(self, target: Tensor) -> str:
        """Why a write to an input, a state or a tensor of the cell is refused."""
        storage = target.untyped_storage()._cdata
        for path, tensor in self.sources.values():
            if tensor.untyped_storage()._cdata == storage:
                name = path.rpartition(".")[2]
                return (
                    f"It changes self.{path} in place, which a compiled loop would not. Keep it in the state: name it "
                    f'in `states = ("h", "{name}")` and return its new value as part of the new state.'
                )
        return "It changes an input or a state in place; compute a new tensor instead."

    def _stale(self, target: Tensor | None) -> list[Key]:
        """Other tensors over the memory that a call is about to write to: their values are no longer known."""
        if target is None or isinstance(self.value(target), Weight):
            return []
        own = key_of(target)
        return [key for key in self._by_storage.get(own[0], ()) if key != own and key in self._values]

    def _record(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        values: list[Any],
        options: dict[str, Any],
        result: Any,
        target: Tensor | None,
    ) -> None:
        results = [result] if isinstance(result, Tensor) else result
        if not isinstance(results, list | tuple) or not all(isinstance(r, Tensor) or r is None for r in results):
            raise Untraceable("It reads the value of a tensor.")
        found = list(values_in((values, options)))
        if target is not None and isinstance(found[0], Weight):
            self._changed_weight(func, args, values, found)
            return
        if len(self.builder.nodes) > MOST_NODES:
            size = f"{len(self.builder.nodes):,} values in its graph" + (", its gradient's included" * self.backward)
            raise Untraceable(f"It is too large: {size}, and there may be {MOST_NODES:,}.")
        plain = name.rstrip("_") if target is not None else name
        made = self._made(func, plain, args, values, options, results, found)
        for tensor, value in zip(results, made, strict=True):
            if tensor is None:
                continue
            if value is None:
                value = Unsupported(tuple(tensor.shape), f"It uses a result of {name} that has no rule.")
            self._check_result(tensor, value)
            if target is None and isinstance(value, Weight) and self.is_known(tensor):
                continue  # a view of all of it, such as detach: the same weight
            self.know(tensor, value)

    def _made(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        values: list[Any],
        options: dict[str, Any],
        results: Sequence[Tensor],
        found: list[Value],
    ) -> Sequence[Value | None]:
        """What the results of a call stand for."""
        unsaid = [value for value in found if isinstance(value, Unsupported)]
        if unsaid:
            return self._of_unsaid(unsaid[0], found, results)
        if any(isinstance(value, Sum | ExternalGrad) for value in found):
            return self._of_sums(name, values, options, results, found)
        if all(isinstance(value, Weight) for value in found):
            of_weights = self._of_weights(func, name, args, values, options, results, found)
            if of_weights is not None:
                return of_weights
        if name in CONSTANTS:
            return [filled(self.writer, name, values, results[0])]
        if name in KEEPS:
            return [found[0]]
        try:
            return self._of_rows(func, name, values, options, results)
        except Untraceable as refusal:
            if not self.backward or any(isinstance(value, Row) for value in found):
                raise
            return [Unsupported(tuple(result.shape), str(refusal)) for result in results]

    def _of_unsaid(self, first: Unsupported, found: list[Value], results: Sequence[Tensor]) -> Sequence[Value]:
        """ExternalGrad the weights that the graph takes anything may happen, elsewhere nothing that it can't say."""
        if not self.backward or any(isinstance(value, Row | Sum) for value in found):
            raise Untraceable(first.why)
        if any(isinstance(value, ExternalGrad) for value in found):
            return [ExternalGrad(tuple(result.shape)) for result in results]
        return [Unsupported(tuple(result.shape), first.why) for result in results]

    def _of_rows(
        self, func: Any, name: str, values: list[Any], options: dict[str, Any], results: Sequence[Tensor]
    ) -> Sequence[Value | None]:
        writer = self.writer
        if name in ("_to_copy", "to"):
            return [self._cast(values[0], results[0])]
        if name == "copy":
            return [writer.move(lambda places: places.expand(results[0].shape), values[1])]
        if name in MOVES:
            if name == "constant_pad_nd" and len(values) > 2 and values[2] != 0:
                raise Untraceable("It pads with a number other than 0.")
            moved = writer.move(func, *values, **options)
            return moved if isinstance(moved, list) else [moved]
        rule = RULES.get(name)
        if rule is None:
            raise Untraceable(f"The op {name} has no rule.")
        options = {key: value for key, value in options.items() if key not in ("dtype", "memory_format")}
        made = rule(writer, *values, **options)
        return list(made) if isinstance(made, tuple) else [made]

    def _cast(self, value: Value, result: Tensor) -> Row:
        if result.dtype == torch.bool:
            return self.writer.truth(value)
        if result.dtype != self.dtype:
            raise Untraceable(f"It computes in {result.dtype} where the cell is {self.dtype}.")
        return self.writer.number(value)

    def _of_sums(
        self, name: str, values: list[Any], options: dict[str, Any], results: Sequence[Tensor], found: list[Value]
    ) -> Sequence[Value | None]:
        if not any(isinstance(value, Sum) for value in found):
            return [ExternalGrad(tuple(result.shape)) for result in results]
        rule = SUMS.get(name)
        if rule is None or not self.backward:
            raise Untraceable("It mixes the rows of the batch.")
        return [rule(self.writer, *values, **options)]

    def _of_weights(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        values: list[Any],
        options: dict[str, Any],
        results: Sequence[Tensor],
        found: list[Value],
    ) -> Sequence[Value | None] | None:
        """What is made of weights alone: a step of the prologue; None where it is work for the graph."""
        if any(self.writer.rows in result.shape for result in results):
            return None  # spread over rows
        fill = _fill(name, values, found)
        if self.backward and fill is None and not _is_view(name):
            return None
        if name == "lift_fresh" and fill is not None:
            number = torch.ops.aten.scalar_tensor.default
            made = self.weights.record(number, "number", [fill], {"dtype": results[0].dtype}, results)
            return [Weight((), made[0].slot, made[0].view, fill)]
        tensors = iter(tensors_in(args))
        refs = mapped(values, lambda value: self._ref(value, next(tensors)), name, Weight)
        made = self.weights.record(func, name, refs, mapped(options, self._ref_plain, name, Weight), results)
        if fill is not None:
            return [Weight(weight.shape, weight.slot, weight.view, fill) for weight in made]
        if len(found) == 1 and isinstance(found[0], Weight) and isinstance(values[0], Weight):
            return weight_views(func, name, found[0], values[1:], made)
        return made

    def _ref(self, value: Weight, tensor: Tensor) -> Ref:
        if not self.backward and not self.followed(tensor):
            name = tensor.grad_fn._forward_cls.__name__  # type: ignore[union-attr]  # a Function's node
            raise Untraceable(
                f"It computes with a weight that {name}, a custom Function, has made together with rows: the gradient "
                "would not go back through it."
            )
        return Ref(value.slot, self.weights.slots[value.slot].differentiable and not tensor.requires_grad)

    def _ref_of(self, tensor: Tensor) -> Ref:
        """The reference to a tensor that is known to stand for a weight."""
        value = self.value(tensor)
        assert isinstance(value, Weight)
        return self._ref(value, tensor)

    def _ref_plain(self, value: Weight) -> Ref:
        return Ref(value.slot)

    def _changed_weight(self, func: Any, args: tuple[Any, ...], values: list[Any], found: list[Value]) -> None:
        target = values[0]
        if not all(isinstance(value, Weight) for value in found):
            raise Untraceable("It writes rows into a tensor that has none.")
        tensors = iter(tensors_in(args[1:]))
        rest = mapped(values[1:], lambda value: self._ref(value, next(tensors)), "", Weight)
        refs = [Ref(target.slot), *rest]
        self.weights.changed(func, refs, {}, target)
        # What the written tensor was filled with, and any view of it, is no longer so.
        storage = args[0].untyped_storage()._cdata
        for key in self._by_storage.get(storage, ()):
            old = self._values.get(key)
            if isinstance(old, Weight):
                self._values[key] = Weight(old.shape, old.slot, old.view)

    def _check_result(self, tensor: Tensor, value: Value) -> None:
        if isinstance(value, Sum) and not self.backward:
            raise Untraceable("It mixes the rows of the batch: it sums over them.")
        if isinstance(value, Row):
            # A factory's numbers take the dtype of what they meet.
            constant = self.builder.nodes[value.node].op == "const"
            if tensor.dtype not in (self.dtype, *_NUMBERS) and not constant:
                raise Untraceable(f"It computes in {tensor.dtype} where the cell is {self.dtype}.")
            if value.shape != tuple(tensor.shape):
                value_shape, shape = value.shape, tuple(tensor.shape)
                raise Untraceable(f"Its rule gives the shape {value_shape}, torch {shape}; please report it.")

    # gradients of the weights that the graph takes

    def watch(self) -> Iterator[Any]:
        """Take the gradient of each computed weight where it arrives, and hide what torch does with it beyond.

        Yields:
            Handles, to be removed after the backward.
        """
        for slot in self.weights.leaves:
            if self.weights.slots[slot].tensor is not None:
                continue  # a source's gradient is asked for by itself
            for node, output in self._edges.get(slot, ()):
                yield node.register_prehook(self._hook(slot, output))

    def _hook(self, slot: int, output: int) -> Callable[[tuple[Tensor | None, ...]], tuple[Tensor | None, ...]]:
        def hook(arrived: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
            gradient = arrived[output]
            if gradient is None:
                return arrived
            self.collect(slot, self.value(gradient))
            hidden = gradient.clone()
            self.know(hidden, ExternalGrad(tuple(hidden.shape)))
            return (*arrived[:output], hidden, *arrived[output + 1 :])

        return hook

    def collect(self, slot: int, gradient: Value) -> None:
        """Add to the gradient of a slot."""
        if isinstance(gradient, ExternalGrad):
            return
        if not isinstance(gradient, Sum):
            raise Untraceable(f"The gradient of {self.weights.slots[slot].name} is no sum over rows.")
        known = self.gradients.get(slot)
        self.gradients[slot] = gradient if not isinstance(known, Sum) else self.writer.total(known, gradient)


def _fill(name: str, values: list[Any], found: list[Value]) -> float | None:
    """The number that a factory, or a view of its result, is filled with."""
    if name in CONSTANTS:
        value = CONSTANTS[name]
        given = values[0] if name == "scalar_tensor" else values[-1] if values else None
        if value is not None:
            return value
        return float(given) if isinstance(given, int | float) else None
    if len(found) == 1 and isinstance(found[0], Weight) and (_is_view(name) or name in ("clone", "_to_copy")):
        return found[0].fill
    return None


def _is_view(name: str) -> bool:
    return (name in MOVES and not name.endswith("backward") and name not in ("cat", "stack", "constant_pad_nd")) or (
        name in KEEPS
    )


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What a call writes to."""
    return [
        args[place] if place < len(args) else kwargs.get(argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _certain(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an op that may draw random numbers doesn't: dropout out of training."""
    if "dropout" not in func._schema.name:
        return False
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    return given.get("train") is False
