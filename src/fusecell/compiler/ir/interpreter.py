"""Evaluate a graph in torch: the reference that tests compare every pass and every kernel with.

It defines what each primitive computes. Quantized cells, which are graphs, are evaluated by it in Python's loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusecell.compiler.ir.axes_interpreter import EVALUATE_AXES, flat_rows
from fusecell.compiler.ir.graph import Graph, Node
from fusecell.compiler.ir.primitives import ARGUMENTS, PRIMITIVES

__all__ = ["EVALUATE", "interpret"]

Attrs = Mapping[str, Any]
Rule = Callable[[Sequence[Tensor], Attrs], Tensor]


def interpret(graph: Graph, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute the outputs of a graph.

    Example:
        >>> import torch
        >>> from fusecell.compiler.ir.graph import Graph
        >>> from fusecell.compiler.ir.interpreter import interpret
        >>> text = 'graph g f64\\nx = input() {"shape": [2]} : row[2]\\ny = neg(x) : row[2]\\nreturn output = y\\n'
        >>> interpret(Graph.parse(text), {"x": torch.ones(1, 2)})["output"]
        tensor([[-1., -1.]])

    Arguments:
        graph: any graph.
        values: for each leaf its value by name: (N, size) for inputs and states, its shape for a weight. They set the
            dtype: float64 values evaluate a float32 graph in float64.

    Returns:
        Each output by its label: (N, size) for rows, bool where truth values, the weight's shape for sums.

    Raises:
        ValueError: where a leaf has no value, or one of another shape.
    """
    needed = graph.needed(graph.outputs.values())
    results: dict[int, Tensor] = {}
    rows = _rows(graph, values)
    dtype = next((value.dtype for value in values.values()), torch.float64)
    for index, node in graph:
        if not needed[index]:
            continue
        if node.op in ARGUMENTS:
            results[index] = _leaf(node, values)
        elif node.op == "const":
            # Rounded as torch rounds a Python number next to a tensor: to infinity where it is too large.
            results[index] = torch.tensor([[node.attrs["value"]]], dtype=torch.float64).to(dtype)
        else:
            args = [results[arg] for arg in node.args]
            if node.op in EVALUATE_AXES:
                args = [flat_rows(results[arg], graph[arg].type.kind == "weight") for arg in node.args]
            if node.op in ("outer", "rowsum", "contract_sum", "scatter_sum"):
                args = [arg.expand(rows, arg.shape[-1]) for arg in args]
            results[index] = EVALUATE[node.op](args, node.attrs)
            if node.type.kind == "weight":
                results[index] = results[index].reshape(node.type.shape)
    return {label: _whole(graph[index], results[index], rows) for label, index in graph.outputs.items()}


def _rows(graph: Graph, values: Mapping[str, Tensor]) -> int:
    for index in (*graph.leaves("input"), *graph.leaves("state")):
        if graph[index].name in values:
            return values[graph[index].name].shape[0]
    return 1


def _leaf(node: Node, values: Mapping[str, Tensor]) -> Tensor:
    value = values.get(node.name)
    if value is None:
        raise ValueError(f"the graph takes {node.name}, {node.type}; got values for {sorted(values)}.")
    shape = tuple(value.shape if node.type.kind == "weight" else value.shape[1:])
    if shape != node.type.shape:
        raise ValueError(f"{node.name} is {node.type}, got a tensor of shape {tuple(value.shape)}.")
    return value


def _whole(node: Node, value: Tensor, rows: int) -> Tensor:
    return value.expand(rows, node.size) if node.type.kind in ("row", "mask") else value


def _product(args: Sequence[Tensor], attrs: Attrs) -> Tensor:
    row, weight = args
    (k0, k1), (f0, f1) = attrs["rows"], attrs["cols"]
    return row @ (weight.T if attrs["transposed"] else weight)[k0:k1, f0:f1]


def _affine(args: Sequence[Tensor], attrs: Attrs) -> Tensor:
    start = 1 if attrs["init"] else 0
    parts = [_product(args[start + 2 * i : start + 2 * i + 2], term) for i, term in enumerate(attrs["terms"])]
    total = parts[0] if not start else args[0] + parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _concat(args: Sequence[Tensor], attrs: Attrs) -> Tensor:
    lead = np.broadcast_shapes(*(arg.shape[:-1] for arg in args))
    return torch.cat([arg.expand(*lead, arg.shape[-1]) for arg in args], -1)


def _outer(a: Tensor, b: Tensor, *, by_pairs: bool) -> Tensor:
    """Sum the products of two rows over all rows; by pairs, of numbers that are rounded to bfloat16."""
    if by_pairs:
        a, b = a.to(torch.bfloat16).to(a.dtype), b.to(torch.bfloat16).to(b.dtype)
    return a.T @ b


def _place(args: Sequence[Tensor], attrs: Attrs) -> Tensor:
    whole = args[0].new_zeros(attrs["shape"])
    where = tuple(slice(at, at + size) for at, size in zip(attrs["corner"], args[0].shape, strict=True))
    whole[where] = args[0]
    return whole


def _tensors(function: Callable[..., Tensor]) -> Rule:
    return lambda args, attrs: function(*args)


def _through(dtype: torch.dtype) -> Rule:
    """Return the rule of rounding to the numbers of a narrower dtype."""
    return lambda args, attrs: args[0].to(dtype).to(args[0].dtype)


def _leaf_rule(args: Sequence[Tensor], attrs: Attrs) -> Tensor:
    raise ValueError("a leaf's value is given, not computed.")


def _named_as_in_torch() -> Mapping[str, Rule]:
    """Return the rules of pointwise primitives whose name in torch is the same: nearly all of them."""
    names = (name for name, primitive in PRIMITIVES.items() if primitive.pointwise and hasattr(torch, name))
    return {name: _tensors(getattr(torch, name)) for name in names}


EVALUATE: Mapping[str, Rule] = {
    **{name: _leaf_rule for name, primitive in PRIMITIVES.items() if primitive.leaf},
    **_named_as_in_torch(),
    "trigamma": lambda args, attrs: torch.special.polygamma(1, args[0]),
    **{name: _tensors(getattr(torch.special, name)) for name in ("i0e", "i1e", "erfcx", "ndtri")},
    "mantissa": lambda args, attrs: torch.frexp(args[0]).mantissa,
    "to_float16": _through(torch.float16),
    "to_bfloat16": _through(torch.bfloat16),
    "to_float32": _through(torch.float32),
    "and": _tensors(torch.logical_and),
    "or": _tensors(torch.logical_or),
    "not": _tensors(torch.logical_not),
    "broadcast": lambda args, attrs: args[0].expand(*args[0].shape[:-1], attrs["size"]),
    "sum": lambda args, attrs: args[0].sum(-1, keepdim=True),
    "amax": lambda args, attrs: args[0].amax(-1, keepdim=True),
    "amin": lambda args, attrs: args[0].amin(-1, keepdim=True),
    "slice": lambda args, attrs: args[0][..., attrs["start"] : attrs["stop"]],
    "concat": _concat,
    "product": _product,
    "affine": _affine,
    "outer": lambda args, attrs: _outer(args[0], args[1], by_pairs="stored" in attrs),
    "rowsum": lambda args, attrs: args[0].sum(0),
    "transpose": lambda args, attrs: args[0].T,
    "total": lambda args, attrs: torch.stack(list(args)).sum(0),
    "place": _place,
    **EVALUATE_AXES,
}
