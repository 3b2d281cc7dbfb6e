r"""Gradients of gradients, by a kernel: the gradient of a directional derivative.

A backward gives the gradients of :math:`\psi = \langle g, (y, s_T) \rangle` for given g. Their own gradient, for a
cotangent v of the gradients of inputs, first states and weights, is that of
:math:`\langle v, \nabla \psi \rangle`, the derivative of :math:`\psi` along v. So it is an ordinary backward, of a scan
over a cell that carries tangents along (`TangentStep`), with v as the tangents and g as what the tangents' results are
weighted with. The compiler makes kernels of that cell as of any other. What it gives by the way, the tangents of the
results, are the gradients of g.

torch's tangents of a few operations have wrong gradients: what was compiled is compared with the Python loop's
gradients of gradients, on two steps, before it is used.

Forward over reverse, as in B. A. Pearlmutter, Fast exact multiplication by the Hessian, 1994.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fusecell.attribute_paths import getter
from fusecell.cell import Cell
from fusecell.compiler.programs.rebind import rebound
from fusecell.compiler.programs.tangent_step import TangentStep
from fusecell.compiler.refusal import Refusal
from fusecell.eager import run_eager
from fusecell.execution.options import Options, State
from fusecell.shapes import Shape, feature_shape, packed

if TYPE_CHECKING:
    from fusecell.compiler.programs.autograd import TrainableStep

__all__ = ["Cotangents", "SecondOrder", "checked"]

_STEPS, _ROWS, _TOLERANCE = 2, 3, 1e-3
_NO_GRADIENT = Refusal(("torch's tangent of an operation of the step has no right gradient.",))
_agreeing: WeakKeyDictionary[TrainableStep, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class Cotangents:
    """What weights the gradients of a scan's inputs, first states and weights; None where nothing does."""

    inputs: Sequence[Tensor | None]
    states: Sequence[Tensor | None]
    weights: Sequence[Tensor | None]


class SecondOrder:
    """The kernels of one step's gradients of gradients, compiled on first use.

    Arguments:
        dtype: of the step.
        compile: traces a cell with its gradient, for the shapes of its inputs and a dtype.
    """

    def __init__(self, dtype: torch.dtype, compile: Callable[..., TrainableStep | Refusal]) -> None:
        self._dtype = dtype
        self._compile = compile
        self._compiled: dict[Any, TrainableStep | Refusal] = {}

    def gradients(
        self,
        cell: Cell,
        scan: tuple[State, State, Mapping[str, Tensor], Options, Shape],
        grads: Sequence[Tensor | None],
        cotangents: Cotangents,
    ) -> list[Tensor | None] | Refusal:
        """Return the gradients of a scan's gradients.

        Arguments:
            scan: the inputs, first states and weights of the forward, its options, and the shape of an output's row.
            grads: the gradients of the output and of each last state that the backward was given.

        Returns:
            The gradients with respect to the inputs, the first states, the weights and ``grads``.
        """
        inputs, state, weights, options, output = scan
        inputs, state = tuple(map(_leaf, inputs)), tuple(map(_leaf, state))
        weights = {path: _leaf(value) for path, value in weights.items()}
        moving = _or_zeros(cotangents.inputs, inputs)
        start = _or_zeros(cotangents.states, state) or [torch.zeros_like(value) for value in state]
        directions = dict(zip(weights, _or_zeros(cotangents.weights, list(weights.values())), strict=False))
        tangents = TangentStep(rebound(cell, weights, ()), output, bool(moving), directions)
        kernels = self.kernels(tangents, [tuple(value.shape[2:]) for value in (*inputs, *moving)])
        if isinstance(kernels, Refusal):
            return kernels
        leaves = [*inputs, *state, *weights.values()]
        return _gradients(kernels, tangents, (*inputs, *moving), (*state, *start), options, grads, leaves)

    def kernels(self, tangents: TangentStep, shapes: Sequence[Shape]) -> TrainableStep | Refusal:
        """Return the kernels of the cell with tangents.

        Arguments:
            tangents: the cell, on plain tensors.
            shapes: of a row of each input.
        """
        key = tangents.of_inputs, tangents.paths, tuple(shapes)
        if key not in self._compiled:
            tangents = tangents.apart()
            kernels = self._compile(tangents, shapes, self._dtype)
            if not isinstance(kernels, Refusal):
                kernels = checked(kernels, tangents, shapes, self._dtype)
            self._compiled[key] = kernels
        return self._compiled[key]


def _gradients(
    kernels: TrainableStep,
    tangents: TangentStep,
    inputs: State,
    state: State,
    options: Options,
    grads: Sequence[Tensor | None],
    leaves: Sequence[Tensor],
) -> list[Tensor | None] | Refusal:
    """Return the gradients of the leaves, and the tangents of the results that have a gradient."""
    with torch.enable_grad():
        result = kernels(tangents, inputs, state, replace(options, recompute=False))
    if isinstance(result, Refusal):
        return result
    results = [tangents.rates_of(result[0]), *result[1][len(state) // 2 :]]
    pairs = [(value, of) for value, of in zip(results, grads, strict=True) if of is not None]
    trainable = [value for value in leaves if value.requires_grad]
    gradients = torch.autograd.grad(
        [value for value, _ in pairs], trainable, [of.detach() for _, of in pairs], allow_unused=True
    )
    by_leaf = {id(value): gradient for value, gradient in zip(trainable, gradients, strict=True)}
    of_grads = [None if of is None else value.detach() for value, of in zip(results, grads, strict=True)]
    return [*(by_leaf.get(id(value)) for value in leaves), *of_grads]


def checked(
    kernels: TrainableStep, tangents: TangentStep, shapes: Sequence[Shape], dtype: torch.dtype
) -> TrainableStep | Refusal:
    """Return the kernels of a cell with tangents if their gradients are the Python loop's; compared once.

    Arguments:
        tangents: the cell, on plain tensors.
        shapes: of a row of each input.
    """
    if kernels not in _agreeing:
        _agreeing[kernels] = _agrees(kernels, tangents, shapes, dtype)
    return kernels if _agreeing[kernels] else _NO_GRADIENT


def _agrees(kernels: TrainableStep, tangents: TangentStep, shapes: Sequence[Shape], dtype: torch.dtype) -> bool:
    """Whether kernels give the gradients of gradients of the Python loop, for two steps of random numbers."""
    count, half = len(tangents.cell.inputs), len(tangents.cell.states)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype) * 0.5

    inputs = [random(_STEPS, _ROWS, *shape) for shape in shapes]
    state = [random(_ROWS, *feature_shape(size)) for size in tangents.state_sizes]
    for value in (*inputs[:count], *state[:half]):
        value.requires_grad_()
    weights = [getter(path)(tangents.cell) for path in tangents.paths]
    moving = inputs[count:] or [torch.zeros_like(value) for value in inputs]
    along = [*moving, *state[half:], *tangents.directions]
    grads, expected = _gradients_of_loop(tangents, inputs[:count], state[:half], along, random)
    leaves = [*inputs[:count], *state[:half], *weights]
    actual = _gradients(kernels, tangents, tuple(inputs), tuple(state), Options(), grads, leaves)
    if isinstance(actual, Refusal):
        return False
    triples = zip(actual[: len(leaves)], expected, leaves, strict=True)
    # A weight that is frozen has no gradient in kernels.
    return all(_close(value, of_loop) for value, of_loop, leaf in triples if leaf.requires_grad)


def _gradients_of_loop(
    tangents: TangentStep,
    inputs: Sequence[Tensor],
    state: Sequence[Tensor],
    along: Sequence[Tensor],
    random: Callable[..., Tensor],
) -> tuple[list[Tensor], Sequence[Tensor | None]]:
    """Return random gradients of a scan's results, and what the Python loop's gradients of gradients for these are.

    Arguments:
        along: what weights the gradients of inputs, first states and weights.
    """
    with torch.enable_grad():
        weights = [getter(path)(tangents.cell).detach().requires_grad_() for path in tangents.paths]
        cell = rebound(tangents.cell, dict(zip(tangents.paths, weights, strict=True)), ())
        output, after = run_eager(cell, tuple(inputs), tuple(state), Options())
        results = [packed(output, 2), *after]
        grads = [random(*value.shape) for value in results]
        pairs = [(value, grad) for value, grad in zip(results, grads, strict=True) if value.requires_grad]
        leaves = [*inputs, *state, *weights]
        first = torch.autograd.grad(
            [value for value, _ in pairs], leaves, [grad for _, grad in pairs], create_graph=True, allow_unused=True
        )
        products = [
            (value * of).sum()
            for value, of in zip(first, along, strict=True)
            if value is not None and value.requires_grad
        ]
        if not products:
            return grads, [None] * len(leaves)
        return grads, torch.autograd.grad(torch.stack(products).sum(), leaves, allow_unused=True)


def _close(actual: Tensor | None, expected: Tensor | None) -> bool:
    if actual is None or expected is None:
        other = expected if actual is None else actual
        return other is None or not bool(other.any())
    return float((actual - expected).norm()) <= _TOLERANCE * float(expected.norm() + 1)


def _or_zeros(cotangents: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Return cotangents, zeros for those that are None; nothing if all are."""
    if all(of is None for of in cotangents):
        return []
    return [torch.zeros_like(v) if of is None else of.detach() for of, v in zip(cotangents, like, strict=True)]


def _leaf(value: Tensor) -> Tensor:
    """Return a tensor with the same values that begins a graph of its own."""
    return value.detach().requires_grad_(value.requires_grad)
