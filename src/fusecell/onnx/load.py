"""``onnx.load``: the recurrent nodes of an ONNX model as layers that can be trained."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from fusecell.errors import ExportError
from fusecell.onnx.node_layer import NodeWeights, RecurrentLayer, UnknownActivations, layer_of_node
from fusecell.onnx.recurrent_nodes import GATES
from fusecell.onnx.scan_node import scan_layer

__all__ = ["load"]

Array = npt.NDArray[Any]
_CALL_ARGUMENTS = {
    4: ("sequence_lens", "lengths"),
    5: ("initial_h", "hx"),
    6: ("initial_c", "the second tensor of hx"),
}
"""Inputs of a node that a layer takes with each call, and how."""
_DAMAGED = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What reading a node raises whose parts don't fit together, in as many ways as there are parts."""


def load(source: str | os.PathLike[str] | onnx.ModelProto) -> dict[str, RecurrentLayer]:
    """Return the recurrent nodes of an ONNX model, by the node's name, as layers with its weights.

    Example:
        >>> import torch, fusecell as fc
        >>> model = fc.onnx.export(fc.GRU(5, 10, bidirectional=True))
        >>> (layer,) = fc.onnx.load(model).values()
        >>> layer
        GRU(5, 10, bidirectional=True)

    Arguments:
        source: a file, or a model. Its nodes are looked for in subgraphs, too.

    Returns:
        For each node of type GRU, LSTM or RNN a layer with one layer of cells, in the order of the graph: the layer of
        that name; a :class:`fusecell.Recurrent` for a node that runs backwards only; and for one with other
        activations, a clip, peepholes or coupled gates a Recurrent or a :class:`fusecell.Bidirectional`, whose cells
        compute the node's equation. For each Scan a Recurrent whose cell computes the node's body, with its constants
        as parameters. Nodes without a name are called after their first output, a name that stands again has ``.1``
        behind it. A layer takes (T, N, features), whatever the node's ``layout``.

    Warns:
        UserWarning: where the node has constants that a layer takes with each call: first states and lengths; and for
            each Scan that is no layer, with the reason, in a model that has others.

    Raises:
        ExportError: for a node that no layer here computes, with the reason, and a model that has none.
    """
    model = source if isinstance(source, onnx.ModelProto) else _read(Path(source))
    layers: dict[str, RecurrentLayer] = {}
    refused: list[ExportError] = []
    opset = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 20)
    _collect(model.graph, None, opset, layers, refused)
    if refused and not layers:
        raise refused[0]
    for each in refused:
        warnings.warn(f"{each} It is left out.", UserWarning, stacklevel=2)
    if not layers:
        kinds = sorted({str(node.op_type) for node in model.graph.node})
        raise ExportError(
            f"onnx.load: the model has no GRU, LSTM, RNN or Scan; it has {', '.join(kinds) or 'no nodes'}."
        )
    return layers


def _array(tensor: onnx.TensorProto) -> Array:
    """Return the numbers of a model's tensor."""
    try:
        return numpy_helper.to_array(tensor)
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(f"onnx.load: the model's tensor {tensor.name} can't be read: {error}.") from error


def _read(path: Path) -> onnx.ModelProto:
    """Read a model's file."""
    try:
        return onnx.load(path)
    except DecodeError as error:
        raise ExportError(f"onnx.load: {path} is no ONNX model, or a part of one: {error}.") from error


class _Scope:
    """The values of a graph that don't depend on its inputs, computed when they are asked for.

    Arguments:
        outer: the scope around it, whose values a subgraph may use.
    """

    def __init__(self, graph: onnx.GraphProto, outer: _Scope | None, opset: int) -> None:
        self._outer = outer
        self._opset = opset
        self._values: dict[str, Array | None] = {}
        self._stored = {each.name: each for each in graph.initializer}
        self._producers = {name: node for node in graph.node for name in node.output if name}

    def constant(self, name: str) -> Array | None:
        """Return a value; None for one that an input of the model may change."""
        if name not in self._values and name in self._stored:
            self._values[name] = _array(self._stored[name])
        if name not in self._values:
            producer = self._producers.get(name)
            if producer is None:
                return None if self._outer is None else self._outer.constant(name)
            self._values[name] = None  # until it is known
            self._compute(producer)
        return self._values[name]

    def _compute(self, node: onnx.NodeProto) -> None:
        feeds = {name: self.constant(name) for name in node.input if name}
        if any(value is None for value in feeds.values()) or any(each.g.node for each in node.attribute):
            return
        inputs = [helper.make_value_info(name, helper.make_tensor_type_proto(0, None)) for name in feeds]
        outputs = [helper.make_value_info(name, helper.make_tensor_type_proto(0, None)) for name in node.output if name]
        graph = helper.make_graph([node], "constant", inputs, outputs)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self._opset)])
        results = ReferenceEvaluator(model).run(None, feeds)
        self._values.update(zip([name for name in node.output if name], results, strict=True))  # type: ignore[arg-type]


def _collect(
    graph: onnx.GraphProto,
    outer: _Scope | None,
    opset: int,
    layers: dict[str, RecurrentLayer],
    refused: list[ExportError],
) -> None:
    """Add a graph's layers, and those of its subgraphs."""
    scope = _Scope(graph, outer, opset)
    for node in graph.node:
        if node.op_type in GATES:
            name = _unique(node, layers)
            layers[name] = _layer(node, name, scope)
        elif node.op_type == "Scan":
            name = _unique(node, layers)
            try:
                layers[name] = scan_layer(node, name, scope.constant, opset)
                _warn_of_states(node, name, scope)
                continue  # what its body has is a part of the step
            except ExportError as error:
                refused.append(error)
            except _DAMAGED as error:
                refused.append(ExportError(f"onnx.load: Scan {name} contradicts itself: {error!r}."))
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    _collect(inner, scope, opset, layers, refused)


def _unique(node: onnx.NodeProto, layers: Mapping[str, Any]) -> str:
    """Return a name for a node that no other has."""
    name = unique = str(node.name) or next(output for output in node.output if output)
    count = 0
    while unique in layers:
        count += 1
        unique = f"{name}.{count}"
    return unique


def _warn_of_states(node: onnx.NodeProto, name: str, scope: _Scope) -> None:
    scanned = next(int(each.i) for each in node.attribute if each.name == "num_scan_inputs")
    for each in node.input[: len(node.input) - scanned]:
        value = scope.constant(each)
        if value is not None and value.any():
            warnings.warn(
                f"onnx.load: Scan {name} begins with a constant state, {each} of shape {value.shape}, which is no part "
                "of a layer: pass it as the state with each call.",
                UserWarning,
                stacklevel=4,
            )


def _layer(node: onnx.NodeProto, name: str, scope: _Scope) -> RecurrentLayer:
    kind = node.op_type
    attributes = _attributes(node, name)
    inputs = [*node.input, *[""] * (8 - len(node.input))]
    _warn_of_constants(kind, name, inputs, scope)
    w, r = (_constant(node, name, scope, at) for at in (1, 2))
    b = _constant(node, name, scope, 3) if inputs[3] else None
    _check_shapes(f"{kind} {name}", attributes, w, r, b, len(GATES[kind]))
    peepholes = _constant(node, name, scope, 7) if kind == "LSTM" and inputs[7] else None
    if peepholes is not None and peepholes.shape != (len(w), 3 * r.shape[-1]):
        raise ExportError(
            f"onnx.load: LSTM {name} has peepholes {peepholes.shape}, expected {(len(w), 3 * r.shape[-1])}."
        )
    direction = attributes.get("direction", "forward")
    if direction not in ("forward", "reverse", "bidirectional") or (direction == "bidirectional") != (len(w) == 2):
        raise ExportError(f"onnx.load: {kind} {name} has the direction {direction!r} and weights of {len(w)}.")
    try:
        return layer_of_node(kind, attributes, NodeWeights(w, r, b, peepholes))
    except UnknownActivations as error:
        raise ExportError(f"onnx.load: {kind} {name} has {error}.") from error


_KINDS = {
    **dict.fromkeys(("hidden_size", "linear_before_reset", "layout", "input_forget", "output_sequence"), int),
    **dict.fromkeys(("activations", "activation_alpha", "activation_beta"), list),
    "direction": str,
    "clip": float,
}
"""The attributes of recurrent nodes."""


def _attributes(node: onnx.NodeProto, name: str) -> dict[str, Any]:
    """Return a node's attributes, texts as such."""
    attributes: dict[str, Any] = {}
    for each in node.attribute:
        value = helper.get_attribute_value(each)
        try:
            value = value.decode() if isinstance(value, bytes) else value
            if isinstance(value, list):
                value = [item.decode() if isinstance(item, bytes) else item for item in value]
        except UnicodeDecodeError as error:
            what = f"onnx.load: {node.op_type} {name} has {each.name} {value!r}"
            raise ExportError(f"{what}, which is no text.") from error
        kind = _KINDS.get(each.name)
        if kind is None or type(value) is not kind:
            expected = "which these nodes don't have" if kind is None else f"expected {kind.__name__}"
            raise ExportError(f"onnx.load: {node.op_type} {name} has the attribute {each.name}={value!r}, {expected}.")
        attributes[each.name] = value
    return attributes


def _check_shapes(what: str, attributes: Mapping[str, Any], w: Array, r: Array, b: Array | None, gates: int) -> None:
    """Check that a node's weights belong together."""
    hidden = r.shape[-1] if r.ndim == 3 else 0
    rows = gates * hidden
    expected = ((len(w), rows, w.shape[-1]), (len(w), rows, hidden), (len(w), 2 * rows)) if w.ndim == 3 else ()
    actual = (w.shape, r.shape, (len(w), 2 * rows) if b is None else b.shape)
    if not hidden or actual != expected or attributes.get("hidden_size", hidden) != hidden:
        size = attributes.get("hidden_size", "no number")
        of_bias = "" if b is None else f", B {b.shape}"
        raise ExportError(
            f"onnx.load: {what} has hidden_size {size} and weights W {w.shape}, R {r.shape}{of_bias}; expected "
            f"(directions, {gates} * hidden_size, features), (directions, {gates} * hidden_size, hidden_size) and "
            f"(directions, {2 * gates} * hidden_size)."
        )


def _warn_of_constants(kind: str, name: str, inputs: list[str], scope: _Scope) -> None:
    for at, (label, argument) in _CALL_ARGUMENTS.items():
        value = scope.constant(inputs[at]) if inputs[at] else None
        if value is not None and (at == 4 or value.any()):
            warnings.warn(
                f"onnx.load: {kind} {name} has a constant {label}, {inputs[at]} of shape {value.shape}, which is no "
                f"part of a layer: pass it as {argument} with each call.",
                UserWarning,
                stacklevel=5,
            )


def _constant(node: onnx.NodeProto, name: str, scope: _Scope, at: int) -> Array:
    value = scope.constant(node.input[at])
    if value is None:
        raise ExportError(
            f"onnx.load: {node.op_type} {name} computes its {'XWRB'[at]} of the model's inputs; a layer's weights are "
            "constants."
        )
    return np.array(value, dtype=np.float32 if value.dtype == np.float16 else value.dtype)
