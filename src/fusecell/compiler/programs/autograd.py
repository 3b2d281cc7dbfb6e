"""Autograd integration: the forward and the backward kernel of a step as one ``autograd.Function``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fusecell.cell import Cell
from fusecell.compiler.frontend import Traced, input_names, trace
from fusecell.compiler.frontend.dtypes import has_16_bits, rounded, widened
from fusecell.compiler.frontend.signature import Key, signature, without_tensors
from fusecell.compiler.ir.sizes import padded
from fusecell.compiler.programs.chunked import ChunkedCall
from fusecell.compiler.programs.inference import reset_state
from fusecell.compiler.programs.progress import told_if_slow
from fusecell.compiler.programs.rebind import rebound
from fusecell.compiler.programs.replay import with_draws
from fusecell.compiler.programs.second_order import Cotangents, SecondOrder
from fusecell.compiler.programs.training import Call, Training
from fusecell.compiler.refusal import Refusal, refusal
from fusecell.compiler.transforms.partition import ForwardBackward, partition
from fusecell.eager import run_eager
from fusecell.errors import CompilerError
from fusecell.execution.context import recomputing
from fusecell.execution.natively import natively
from fusecell.execution.options import Options, State
from fusecell.forks import new_lock
from fusecell.shapes import packed
from fusecell.torch_internals import apply_directly, forward_ad
from fusecell.torch_transforms import in_forward_mode, in_functorch_transform, is_batched_gradient

__all__ = ["TrainableStep", "compile_trainable", "differentiated", "transformed"]

_LOCK = new_lock()


class TrainableStep:
    """A step traced with its gradient, and the kernels for each choice of gradients that a call has needed.

    Arguments:
        inputs: the names of the step's inputs.
        key: all of the cell's signature but its tensors, to be checked before the step is run again.
        about: the class of the cell, for ``FUSECELL_DEBUG``.
        dtypes: of each input in the step, where some are integers.
    """

    def __init__(
        self,
        traced: Traced,
        inputs: Sequence[str],
        key: Key = (),
        about: str = "step",
        dtypes: Sequence[torch.dtype] | None = None,
    ) -> None:
        self.traced = traced
        self.dtypes = dtypes
        self._about = about
        self._key = key
        self._inputs = (*inputs, *traced.draw_names)
        names = traced.weight_names
        self._labels = (*(f"grad.input.{name}" for name in self._inputs), *(f"grad.weight.{name}" for name in names))
        self._trainings: dict[tuple[bool, ...], Training | Refusal] = {}

    def __call__(
        self,
        cell: Cell,
        inputs: State,
        state: State,
        options: Options,
        before: tuple[Training, Tensor] | None = None,
    ) -> tuple[Tensor, State] | Refusal:
        """Run over (T, N, ...) inputs with gradients; see :func:`fusecell.eager.run_eager`.

        Arguments:
            before: the kernels of the same call, which has been run, and what it saved. Then the results have no
                values, only gradients.
        """
        prologue = self.traced.weights
        weights = prologue.values(cell)
        flags = self.flags([value.requires_grad for value in inputs], weights)
        recompute = options.recompute or recomputing()
        in_chunks = recompute == "chunk"
        recompute = bool(recompute) and not in_chunks
        # Without the lock, as a dict's get is atomic: most calls find their kernels.
        training = self._trainings.get((recompute, *flags)) or self.training(flags, recompute)
        if isinstance(training, Refusal):
            return training
        generator_state = torch.get_rng_state() if self.traced.draws else None
        inputs = with_draws(inputs, self.traced, options)
        reset = () if options.resets is None else reset_state(cell, inputs[0])
        dtype = inputs[0].dtype
        if has_16_bits(dtype):
            # Under autograd, which so rounds the gradient of each once.
            inputs, state, reset = map(widened, (inputs, state, reset))
        kind: type[Call] = ChunkedCall if in_chunks else Call
        call = kind.of(training, inputs, state, reset, weights, options, self.traced.shapes["output"])
        call.generator_state = generator_state
        if before is not None and before[0] is training:
            call.saved = before[1]
        results = _apply(self, cell, call, *inputs, *state, *reset, *weights, *prologue.originals(cell))
        if has_16_bits(dtype):
            results = rounded(results, dtype)
        of_output = self.traced.output_dtype
        return results[0] if of_output is None else results[0].to(of_output), results[1:]

    @cached_property
    def second_order(self) -> SecondOrder:
        """The kernels of gradients of gradients."""
        return SecondOrder(self.traced.dtype, compile_trainable)

    def has_second_order(self, call: Call) -> bool:
        """Whether gradients of gradients may have kernels: of a plain call, whose weights are attributes unchanged."""
        traced = self.traced
        plain = traced.is_plain and self.dtypes is None and not has_16_bits(traced.dtype)
        return plain and traced.weights.direct_paths is not None and call.options.resets is None

    def check_unchanged(self, cell: Cell) -> None:
        """Raise RuntimeError if the cell's step would no longer compute what was traced."""
        if self._key and _fixed_part(cell, self.traced.leftovers) != self._key:
            raise RuntimeError(
                f"An attribute, mode or hook of {type(cell).__name__} has changed since its forward. A gradient that "
                "has one itself runs the step again and would now be another's: change it after the backward, "
                'or run the forward under fusecell.runner("eager").'
            )

    def saved_numbers(self, cell: Cell, inputs: Sequence[bool], recompute: bool) -> int:
        """Return how many numbers are saved per row and step for the gradients of all weights and of some inputs."""
        flags = self.flags(inputs, self.traced.weights.values(cell))
        graphs = self.forward_backward(flags, recompute)
        return sum(padded(size) for _, size in graphs.saved)

    def flags(self, inputs: Sequence[bool], weights: State) -> tuple[bool, ...]:
        """Return for each input, each draw and each weight whether it needs a gradient, given that of the inputs."""
        draws = [False] * len(self.traced.draws)
        return (*inputs, *draws, *[value.requires_grad for value in weights])

    def forward_backward(self, flags: Sequence[bool], recompute: bool) -> ForwardBackward:
        """Partition the joint graph for some gradients; the arguments are those of :meth:`training`."""
        gradients = [label for label, flag in zip(self._labels, flags, strict=True) if flag]
        return partition(self.traced.graph, gradients, recompute=recompute)

    def training(self, flags: Sequence[bool], recompute: bool) -> Training | Refusal:
        """Return the kernels for some gradients, compiled on first use.

        Arguments:
            flags: for each input, draw and weight whether it needs a gradient, as of :meth:`flags`.
            recompute: save the states only, and compute everything else again in the backward.
        """
        key = (recompute, *flags)
        with _LOCK:  # so that two threads do not compile the same
            if key not in self._trainings:
                try:
                    with told_if_slow(self._about):
                        graphs = self.forward_backward(flags, recompute)
                        self._trainings[key] = Training(self._inputs, self.traced.weight_names, graphs, self._about)
                except (CompilerError, AssertionError, LookupError) as error:
                    self._trainings[key] = refusal(error)
            return self._trainings[key]


def compile_trainable(
    cell: Cell,
    features: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    dtypes: Sequence[torch.dtype] | None = None,
) -> TrainableStep | Refusal:
    """Trace a cell's step together with its gradient.

    Arguments:
        features: the shape of each input behind (T, N).
        dtypes: of each input in the step, where some are integers.
    """
    traced = trace(cell, features, dtype, gradients=True, dtypes=dtypes, draws=True, leftovers=True)
    if isinstance(traced, Refusal):
        return traced
    return TrainableStep(traced, input_names(cell), _fixed_part(cell, traced.leftovers), type(cell).__name__, dtypes)


def _fixed_part(cell: Cell, leftovers: Sequence[str]) -> Key:
    """Return all of a cell's signature but its tensors and what its steps leave behind."""
    return without_tensors(signature(cell, without=leftovers))


class _Scan(torch.autograd.Function):
    """The forward kernel, and the backward kernel as its gradient."""

    @staticmethod
    @natively
    def forward(ctx: Any, step: TrainableStep, cell: Cell, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        saved, outputs, after = call.forward(tensors)
        ctx.step, ctx.cell, ctx.call = step, cell, call
        ctx.set_materialize_grads(False)  # None for a gradient that there is none of, instead of zeros
        ctx.save_for_backward(saved, *tensors)  # which sees if a tensor is changed in place before the backward
        return outputs, *after

    @staticmethod
    @natively
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        all_saved: State = ctx.saved_tensors
        saved, tensors = all_saved[0], all_saved[1:]
        if all(grad is None for grad in grads):
            return (None,) * (3 + len(tensors))
        call: Call = ctx.call
        if torch.is_grad_enabled() or transformed(grads):
            if transformed(grads) or not ctx.step.has_second_order(call):
                return None, None, None, *_differentiable(ctx, tensors, grads)
            return None, None, None, *_with_gradients(ctx, saved, tensors, grads)
        return None, None, None, *call.gradients(saved, tensors, grads)


# Past torch's own `apply`, which looks for transforms of torch.func: a call under one does not come here.
_apply: Any = apply_directly(_Scan)


class _Gradients(torch.autograd.Function):
    """The backward kernel, and the kernels of `second_order` as its gradient."""

    @staticmethod
    @natively
    def forward(ctx: Any, first: Any, saved: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.first = first
        ctx.set_materialize_grads(False)
        count = len(first.needs_input_grad) - 3
        ctx.save_for_backward(*tensors)
        gradients = first.call.gradients(saved, tensors[:count], tensors[count:])
        return tuple([gradients[place] for place in first.call.gradient_places])

    @staticmethod
    @natively
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        first, tensors = ctx.first, ctx.saved_tensors
        call: Call = first.call
        count = len(first.needs_input_grad) - 3
        of: list[Tensor | None] = [None] * count
        for place, cotangent in zip(call.gradient_places, cotangents, strict=True):
            of[place] = cotangent
        if not torch.is_grad_enabled() and not transformed(cotangents):
            step: TrainableStep = first.step
            step.check_unchanged(first.cell)
            inputs, state, _, weights, _ = call.split(tensors[:count])
            a, b, c, _ = call.ends
            paths = step.traced.weights.direct_paths or ()
            scan = inputs, state, dict(zip(paths, weights, strict=True)), call.options, call.output
            cotangents_of = Cotangents(of[:a], of[a:b], of[c:])
            gradients = step.second_order.gradients(first.cell, scan, tensors[count:], cotangents_of)
            if not isinstance(gradients, Refusal):
                return None, None, *gradients
        return None, None, *_differentiated_twice(first, tensors, of, ctx.needs_input_grad[2:])


def _with_gradients(ctx: Any, saved: Tensor, tensors: State, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Compute gradients by the backward kernel that have gradients by kernels themselves."""
    gradients = _Gradients.apply(ctx, saved, *tensors, *grads)  # type: ignore[no-untyped-call]  # torch's
    result: list[Tensor | None] = [None] * len(tensors)
    call: Call = ctx.call
    for place, gradient in zip(call.gradient_places, gradients, strict=True):
        result[place] = gradient
    return result


def _differentiated_twice(
    first: Any, tensors: Sequence[Any], cotangents: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Compute gradients of gradients in the Python loop: those that have gradients again, or have no kernels."""
    count = len(first.needs_input_grad) - 3
    return differentiated(
        lambda aliases: _differentiable(first, aliases[:count], aliases[count:]), tensors, needed, cotangents
    )


def transformed(grads: Sequence[Tensor | None]) -> bool:
    """Whether these are the gradients of many backwards at once (vmap), which have no memory that a kernel could read,
    or have tangents, which a kernel would leave out.

    Such gradients can reach a backward whose forward was under no transform: ``torch.autograd.grad`` batches them
    itself with ``is_grads_batched=True``.
    """
    return in_functorch_transform() or any(grad is not None and _is_special(grad) for grad in grads)


def _is_special(grad: Tensor) -> bool:
    """Whether a gradient is many, or has a tangent."""
    if is_batched_gradient(grad):
        return True
    return in_forward_mode() and forward_ad.unpack_dual(grad).tangent is not None  # type: ignore[no-untyped-call]  # torch's


def _differentiable(ctx: Any, tensors: State, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Compute gradients that have gradients: of the Python loop over the step, with the tensors of the forward."""
    call: Call = ctx.call
    step: TrainableStep = ctx.step
    step.check_unchanged(ctx.cell)
    dtype = step.traced.dtype

    def eager(aliases: State) -> State:
        inputs, state, reset, weights, originals = call.split(aliases)
        if has_16_bits(dtype):  # back to the numbers that they were made from
            inputs, state, reset = (rounded(values, dtype) for values in (inputs, state, reset))
        if step.dtypes is not None:  # and the numbers of an integer input back to integers
            inputs = tuple(value.to(kind) for value, kind in zip(inputs, step.dtypes, strict=False))
        cell = rebound(ctx.cell, step.traced.weights.bindings(weights, originals), reset)
        with _as_drawn(call.generator_state):
            outputs, after = run_eager(cell, inputs[: len(cell.inputs)], state, call.options)
        return widened((packed(outputs, 2).to(dtype), *after))

    return differentiated(eager, tensors, ctx.needs_input_grad[3:], grads)


@contextmanager
def _as_drawn(generator_state: Tensor | None) -> Iterator[None]:
    """Draw from torch's generator as at another time, and leave it as it was."""
    if generator_state is None:
        yield
        return
    with torch.random.fork_rng(devices=()):
        torch.set_rng_state(generator_state)
        yield


def differentiated(
    compute: Callable[[Any], Sequence[Tensor | None]],
    tensors: Sequence[Any],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Run a computation again in torch's autograd; return gradients of its tensors that have gradients themselves.

    Arguments:
        tensors: those that it is given; None in the place of one that there is none of.
        needed: for each tensor, whether its gradient is needed.
        grads: the gradients of the results.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, so that a tensor that is passed twice gets each of its two gradients once.
        aliases = tuple(value.view_as(value) if need else value for value, need in zip(tensors, needed, strict=True))
        results = compute(aliases)
    pairs = [
        (value, grad)
        for value, grad in zip(results, grads, strict=True)
        if grad is not None and value is not None and value.requires_grad
    ]
    result: list[Tensor | None] = [None] * len(tensors)
    if not pairs:
        return result
    # A tensor that was frozen after the forward needs no gradient any more.
    indices = [index for index, need in enumerate(needed) if need and aliases[index].requires_grad]
    gradients = torch.autograd.grad(
        [value for value, _ in pairs],
        [aliases[index] for index in indices],
        [grad for _, grad in pairs],
        create_graph=create_graph,
        allow_unused=True,
    )
    for index, grad in zip(indices, gradients, strict=True):
        result[index] = grad
    return result
