r"""Gradients of gradients, by a kernel: the gradient of a directional derivative.

A backward gives the gradients of :math:`\psi = \langle g, (y, s_T) \rangle` for given g. Their own gradient, for a
cotangent v of the gradients of inputs, first states and weights, is that of
:math:`\langle v, \nabla \psi \rangle`, the derivative of :math:`\psi` along v. So it is an ordinary backward, of a scan
over a cell that carries tangents along (`TangentStep`), with v as the tangents and g as what the tangents' results are
weighted with. The compiler makes kernels of that cell as of any other. What it gives by the way, the tangents of the
results, are the gradients of g.

torch's tangents of a few operations have no gradients of their own, or wrong ones: norms are spelled out here, and what
was compiled is compared with the Python loop's gradients of gradients, on two steps, before it is used.

Forward over reverse, as in B. A. Pearlmutter, Fast exact multiplication by the Hessian, 1994.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fusecell.attribute_paths import getter
from fusecell.cell import Cell
from fusecell.compiler.programs.rebind import rebound
from fusecell.compiler.refusal import Refusal
from fusecell.eager import run_eager
from fusecell.execution.options import Options, State
from fusecell.shapes import Shape, feature_shape, packed
from fusecell.torch_internals import sharing_dual_level

if TYPE_CHECKING:
    from fusecell.compiler.programs.autograd import TrainableStep

__all__ = ["Cotangents", "SecondOrder", "TangentStep"]

_TANGENT = "_tangent"
_STEPS, _ROWS, _TOLERANCE = 2, 3, 1e-3


def _layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    dims = list(range(-len(shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    result = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


def _group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    parts = x.reshape(x.shape[0], groups, -1)
    result = _layer_norm(parts, parts.shape[-1:], eps=eps).reshape(x.shape)
    sizes = (-1, *[1] * (x.dim() - 2))
    result = result if weight is None else result * weight.reshape(sizes)
    return result if bias is None else result + bias.reshape(sizes)


class _SpelledOut(TorchFunctionMode):
    """Function mode in which norms are computed by operations whose tangents have gradients."""

    functions: ClassVar[Mapping[Any, Callable[..., Tensor]]] = {
        torch.layer_norm: _layer_norm,
        torch.nn.functional.layer_norm: _layer_norm,
        torch.group_norm: _group_norm,
        torch.nn.functional.group_norm: _group_norm,
    }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        function: Callable[..., Any] = self.functions.get(func, func)
        return function(*args, **(kwargs or {}))


class TangentStep(Cell):
    r"""A cell with a tangent beside each of its states: its output is the tangent of the cell's.

    .. math:: (\dot y, \dot s') = \frac{\partial\,\mathrm{step}}{\partial (x, s, W)} \cdot (\dot x, \dot s, \dot W)

    Arguments:
        cell: the cell.
        output: the shape of a row of its output.
        of_inputs: whether inputs have tangents, which are inputs behind them.
        directions: the tangent of each weight that has one, by the weight's path.
        with_value: the outputs are two, ``"value"``, the cell's own, and ``"tangent"``.
    """

    outputs = ("value", "tangent")

    def __init__(
        self,
        cell: Cell,
        output: Shape,
        of_inputs: bool,
        directions: Mapping[str, Tensor],
        with_value: bool = False,
    ) -> None:
        super().__init__(cell.input_size, cell.hidden_size)
        self.cell = cell
        self.of_inputs = of_inputs
        names = {
            "inputs": (*cell.inputs, *(name + _TANGENT for name in cell.inputs * of_inputs)),
            "states": (*cell.states, *(name + _TANGENT for name in cell.states)),
        }
        self.__dict__.update(names)
        self.state_sizes = (*cell.state_sizes, *cell.state_sizes)
        self.output_size = dict.fromkeys(self.outputs, output) if with_value else output
        self.with_value, self.output = with_value, output
        self.paths = tuple(directions)
        self.directions = list(directions.values())

    def step(self, x: Any, state: State) -> tuple[Any, State]:
        inputs = x if len(self.inputs) > 1 else (x,)
        count, states = len(self.cell.inputs), len(self.cell.states)
        primal, moving = inputs[:count], inputs[count:]
        weights = tuple(getter(path)(self.cell) for path in self.paths)

        def results(*values: Tensor) -> State:
            cell = rebound(self.cell, dict(zip(self.paths, values[states + len(moving) :], strict=True)), ())
            of_x = values[states : states + len(moving)] or primal
            output, after = cell.step(of_x if count > 1 else of_x[0], values[:states])
            return packed(output, 1), *after

        primals = (*state[:states], *(primal if moving else ()), *weights)
        tangents = (*state[states:], *moving, *self.directions)
        with warnings.catch_warnings(), _SpelledOut(), sharing_dual_level():
            for kind in (DeprecationWarning, FutureWarning):  # torch's own, of its first use
                warnings.simplefilter("ignore", kind)
            pair: Any = torch.func.jvp(results, primals, tangents)
        values, rates = pair
        output = dict(zip(self.outputs, (values[0], rates[0]), strict=True)) if self.with_value else rates[0]
        return output, (*values[1:], *rates[1:])


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
        kernels = self._kernels(tangents, (*inputs, *moving))
        if isinstance(kernels, Refusal):
            return kernels
        leaves = [*inputs, *state, *weights.values()]
        return _gradients(kernels, tangents, (*inputs, *moving), (*state, *start), options, grads, leaves)

    def _kernels(self, tangents: TangentStep, inputs: State) -> TrainableStep | Refusal:
        shapes = [tuple(value.shape[2:]) for value in inputs]
        key = tangents.of_inputs, tangents.paths, tuple(shapes)
        if key not in self._compiled:
            kernels = self._compile(tangents, shapes, self._dtype)
            if not isinstance(kernels, Refusal) and not _agrees(kernels, tangents, shapes, self._dtype):
                kernels = Refusal(("torch's tangent of an operation of the step has no right gradient.",))
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
    results = [result[0], *result[1][len(state) // 2 :]]
    pairs = [(value, of) for value, of in zip(results, grads, strict=True) if of is not None]
    trainable = [value for value in leaves if value.requires_grad]
    gradients = torch.autograd.grad(
        [value for value, _ in pairs], trainable, [of.detach() for _, of in pairs], allow_unused=True
    )
    by_leaf = {id(value): gradient for value, gradient in zip(trainable, gradients, strict=True)}
    of_grads = [None if of is None else value.detach() for value, of in zip(results, grads, strict=True)]
    return [*(by_leaf.get(id(value)) for value in leaves), *of_grads]


def _agrees(kernels: TrainableStep, tangents: TangentStep, shapes: Sequence[Shape], dtype: torch.dtype) -> bool:
    """Whether kernels give the gradients of gradients of the Python loop, for two steps of random numbers."""
    cell, count = tangents.cell, len(tangents.cell.inputs)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype) * 0.5

    with torch.enable_grad():
        inputs = [random(_STEPS, _ROWS, *shape) for shape in shapes]
        state = [random(_ROWS, *feature_shape(size)) for size in tangents.state_sizes]
        for value in (*inputs[:count], *state[: len(state) // 2]):
            value.requires_grad_()
        weights = [getter(path)(cell) for path in tangents.paths]
        leaves = [*inputs[:count], *state[: len(state) // 2], *weights]
        output, after = run_eager(cell, tuple(inputs[:count]), tuple(state[: len(state) // 2]), Options())
        results = [packed(output, 2), *after]
        grads = [random(*value.shape) for value in results]
        pairs = [(value, grad) for value, grad in zip(results, grads, strict=True) if value.requires_grad]
        first = torch.autograd.grad(
            [value for value, _ in pairs], leaves, [grad for _, grad in pairs], create_graph=True, allow_unused=True
        )
        moving = inputs[count:] or [torch.zeros_like(value) for value in inputs]
        along = zip(first, (*moving, *state[len(state) // 2 :], *tangents.directions), strict=True)
        products = [(value * of).sum() for value, of in along if value is not None and value.requires_grad]
        expected: Sequence[Tensor | None] = [None] * len(leaves)
        if products:
            expected = torch.autograd.grad(torch.stack(products).sum(), leaves, allow_unused=True)
    actual = _gradients(kernels, tangents, tuple(inputs), tuple(state), Options(), grads, leaves)
    if isinstance(actual, Refusal):
        return False
    return all(_close(*pair) for pair in zip(actual, expected, strict=False))


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
