"""Small weights: the matrices of a stream's products in 16 or 8 bits, for steps that are bound by reading them.

A matrix is rounded to the nearest numbers of the format; all arithmetic stays float32. ``int8`` gives each output of a
product a scale::

    scale[j] = max over k of |W[j, k]| / 127
    y[j] = scale[j] * sum over k of round(W[j, k] / scale[j]) * x[k]

``int8-dynamic`` rounds what a matrix is multiplied by as well, at each step and for each row, with a scale of its own::

    size = max over k of |x[k]| / 127
    y[j] = scale[j] * size * sum over k of round(W[j, k] / scale[j]) * round(x[k] / size)

The sum is one of whole numbers, which CPUs with VNNI add four at a time; its bits are the same wherever it is computed.

Weights that anything but a product reads (a bias, a norm's gain, an embedding) stay float32.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fusecell.compiler.ir.graph import Builder, Graph, Node, rebuild
from fusecell.compiler.ir.storage import LARGEST_I8, MOST_EXACT, Storage
from fusecell.streaming.bound_step import Array, Part

__all__ = [
    "FORMATS", "StoredWeight", "UnreadableWeights", "check_format", "check_storage", "stored_weights",
    "with_small_weights",
]  # fmt: skip

FORMATS = ("float32", "bfloat16", "float16", "int8", "int8-dynamic")
"""What weights can be stored as."""
_STORAGE = {
    "bfloat16": Storage.BF16, "float16": Storage.F16, "int8": Storage.I8, "int8-dynamic": Storage.I8_I8
}  # fmt: skip
_NAMES = {storage.value: name for name, storage in _STORAGE.items()}
_SCALE = ".scale"
_LEAST = 1e-30
"""The largest number of a row, at the least: its reciprocal, times 127, is a float32 as well."""


class UnreadableWeights(ValueError):
    """Weights are stored in a format that this CPU has no instruction to read."""


@dataclass(frozen=True)
class StoredWeight:
    """How a weight of a stream is stored.

    Example:
        >>> import fusecell as fc
        >>> weight = fc.Stream(fc.GRUCell(5, 10), weights="int8").weights[0]
        >>> weight.name, weight.shape, weight.format, weight.bytes
        ('0.weight_ih', (30, 5), 'int8', 270)

    Attributes:
        name: the number of the cell from the bottom, and the weight's name in it: ``"0.weight_hh"``.
        shape: of the weight.
        format: one of ``"float32"`` (or ``"float64"``), ``"bfloat16"``, ``"float16"``, ``"int8"`` and
            ``"int8-dynamic"``.
        bytes: that it takes, with its scales.
        reason: why it has the format of the arithmetic although small weights were asked for; else empty.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    bytes: int
    reason: str = ""


def check_format(format: str, keep: Collection[str], dtype: np.dtype[np.generic]) -> None:
    """Raise for a format that doesn't exist, or that this machine or this stream can't use.

    Raises:
        TypeError: for weights of float64, or names that are one text.
        ValueError: for any other format.
    """
    if format not in FORMATS:
        raise ValueError(f"weights are stored as one of {', '.join(FORMATS)}, got {format!r}.")
    if isinstance(keep, str):
        raise TypeError(f"keep takes a list of names of weights, got the text {keep!r}: write keep=[{keep!r}].")
    if format == "float32":
        if keep:
            raise ValueError("keep names weights that stay float32, and with weights='float32' all do.")
        return
    if dtype != np.float32:
        raise TypeError(f"Weights of {format} are for cells that compute in float32, this one computes in {dtype}.")
    if format == "float16":
        _check_float16()


def check_storage(graph: Graph) -> None:
    """Raise UnreadableWeights if a graph has weights in a format that this CPU can't read."""
    if any(graph[leaf].attrs.get("stored") == Storage.F16.value for leaf in graph.leaves("weight")):
        _check_float16()


def _check_float16() -> None:
    from fusecell.compiler.backend.target import host_target  # LLVM knows the CPU: on use only

    if not host_target().converts_half:
        raise UnreadableWeights(
            f"{host_target().name} has no instruction that reads float16; weights='bfloat16' takes as much memory."
        )


def with_small_weights(parts: Sequence[Part], format: str, keep: Collection[str]) -> list[Part]:
    """Return the parts of a stream, compiled anew for weights of another format.

    Arguments:
        format: one of `FORMATS`, which `check_format` has passed.
        keep: weights that stay float32: names of `StoredWeight`, or what these end with after a point.

    Raises:
        ValueError: if no weight has one of the names.
    """
    if format == "float32":
        return list(parts)
    names = [name for place, part in enumerate(parts) for name in _names(place, part.graph)]
    for name in keep:
        if not any(_is_named(each, (name,)) for each in names):
            raise ValueError(f"keep names {name!r}, and the weights are {', '.join(names)}.")
    return [_smaller(place, part, _STORAGE[format], keep) for place, part in enumerate(parts)]


def stored_weights(parts: Sequence[Part], wanted: str = "float32", keep: Collection[str] = ()) -> list[StoredWeight]:
    """List the weights of a stream and how each is stored.

    Arguments:
        wanted: the format that was asked for.
        keep: the names of those that were to stay as they are.
    """
    stored = []
    for place, part in enumerate(parts):
        leaves, reasons = part.graph.leaves("weight"), _reasons(part, _STORAGE.get(wanted))
        arrays = dict(zip(leaves, part.weights, strict=True))
        scales = {part.graph[index].name: index for index in leaves}
        for index in leaves:
            node, full = part.graph[index], f"{place}.{part.graph[index].name}"
            kind = node.attrs.get("stored")
            if node.name.endswith(_SCALE) and scales.get(node.name.removesuffix(_SCALE)) is not None:
                continue
            if kind is None:
                why = "" if wanted == "float32" else "as asked" if _is_named(full, keep) else reasons.get(index, "")
                stored.append(StoredWeight(full, node.type.shape, str(part.dtype), arrays[index].nbytes, why))
                continue
            size = arrays[index].size * Storage(kind).itemsize
            if node.name + _SCALE in scales:
                size += arrays[scales[node.name + _SCALE]].nbytes
            stored.append(StoredWeight(full, node.type.shape, _NAMES[kind], size))
    return stored


def _names(place: int, graph: Graph) -> Iterator[str]:
    for index in graph.leaves("weight"):
        yield f"{place}.{graph[index].name}"


def _is_named(full: str, names: Collection[str]) -> bool:
    """Whether one of some names is a weight's, whole or without the number of its cell."""
    return any(full == name or full.partition(".")[2] == name for name in names)


def _reasons(part: Part, storage: Storage | None) -> dict[int, str]:
    """Say of each weight that can't be stored in a format why that is, by its index in the graph."""
    graph, users = part.graph, part.graph.users()
    reasons = {}
    for index, value in zip(graph.leaves("weight"), part.weights, strict=True):
        products = [graph[user] for user in users[index]]
        others = sorted({node.op for node in products} - {"product"})
        if value.ndim != 2:
            reasons[index] = "not a matrix"
        elif not products:
            reasons[index] = "unused"
        elif others:
            reasons[index] = f"read by {', '.join(others)}"
        elif any(index in node.args[:1] for node in products):
            reasons[index] = "multiplied by a weight"
        elif len({node.attrs["transposed"] for node in products}) > 1:
            reasons[index] = "multiplied from both sides"
        elif not np.isfinite(value).all():
            reasons[index] = "not all of it is finite"
        elif storage is not None and np.abs(value).max() > storage.largest:
            reasons[index] = f"beyond the range of {_NAMES[storage.value]}"
    return reasons


def _smaller(place: int, part: Part, storage: Storage, keep: Collection[str]) -> Part:
    """Return a part whose products read weights of another format."""
    graph, reasons, users = part.graph, _reasons(part, storage), part.graph.users()
    small = {
        index
        for index in graph.leaves("weight")
        if index not in reasons and not _is_named(f"{place}.{graph[index].name}", keep)
    }
    if not small:
        return part
    values = dict(zip(graph.leaves("weight"), part.weights, strict=True))
    weights: list[Array] = []
    scale_leaves: dict[int, int] = {}
    operands: dict[int, tuple[int, int]] = {}

    def rewritten(builder: Builder, index: int, args: tuple[int, ...]) -> int:
        node = graph[index]
        if node.op == "weight":
            value = values[index]
            if index not in small:
                weights.append(value)
                return builder.add_like(node, args)
            if storage.is_whole:
                value, scale = _quantised(value, by_rows=graph[users[index][0]].attrs["transposed"])
            weights.append(storage.rounded(value))
            leaf = builder.add("weight", name=node.name, **node.attrs, stored=storage.value)
            if storage.is_whole:
                scale_leaves[index] = builder.add("weight", name=node.name + _SCALE, shape=list(scale.shape))
                weights.append(scale)
            return leaf
        if node.op != "product" or node.args[1] not in scale_leaves:
            return builder.add_like(node, args)
        scales = scale_leaves[node.args[1]]
        start, stop = node.attrs["cols"]
        if stop - start != builder.size(scales):
            scales = builder.add("slice", scales, start=start, stop=stop)
        if storage is Storage.I8:
            return builder.add("mul", builder.add_like(node, args), scales)
        if args[0] not in operands:
            operands[args[0]] = _whole_operand(builder, args[0], graph[node.args[0]].name)
        whole, size = operands[args[0]]
        return builder.add("mul", _sum_of_bytes(builder, node, whole, args[1], scales), size)

    from fusecell.compiler.runtime.kernel import compile_graph

    smaller = rebuild(graph, rewritten)
    return replace(part, graph=smaller, kernel=compile_graph(smaller, about=part.kind), weights=weights)


def _whole_operand(builder: Builder, operand: int, name: str) -> tuple[int, int]:
    """Round a product's operand to whole numbers up to 127; return these and the size of one, for each row."""
    largest = builder.add("amax", builder.add("abs", operand), name=f"{name}.largest")
    largest = builder.add("maximum", largest, builder.const(_LEAST))  # of a row of zeros
    per_size = builder.add("div", builder.const(float(LARGEST_I8)), largest)
    whole = builder.add("round", builder.add("mul", operand, per_size), name=f"{name}.whole")
    return whole, builder.add("mul", largest, builder.const(1 / LARGEST_I8), name=f"{name}.size")


def _sum_of_bytes(builder: Builder, product: Node, whole: int, weight: int, scales: int) -> int:
    """Add up the scaled products of as many features at a time as have a sum that float32 has."""
    first, last = product.attrs["rows"]
    parts = []
    for start in range(first, last, MOST_EXACT):
        stop = min(start + MOST_EXACT, last)
        rows = whole
        if (start, stop) != (first, last):
            rows = builder.add("slice", whole, start=start - first, stop=stop - first)
        attrs = {**product.attrs, "rows": [start, stop]}
        parts.append(builder.add("mul", builder.add("product", rows, weight, **attrs), scales))
    return functools.reduce(lambda one, other: builder.add("add", one, other), parts)


def _quantised(value: Array, *, by_rows: bool) -> tuple[Array, Array]:
    """Return whole numbers up to 127 and the scale of each output; outputs are rows, or columns."""
    largest = np.abs(value).max(axis=1 if by_rows else 0)
    # An output without weights has any scale: 1 makes zeros of zeros, and of what has no scale that is no denormal.
    scale = largest / np.float32(LARGEST_I8)
    scale = np.where(scale >= np.finfo(np.float32).tiny, scale, 1).astype(np.float32)
    whole = value / (scale[:, None] if by_rows else scale)
    return np.clip(np.rint(whole), -LARGEST_I8, LARGEST_I8).astype(np.float32), scale
