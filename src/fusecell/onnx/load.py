"""``onnx.load``: the recurrent nodes of an ONNX model as layers that can be trained."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper

from fusecell.drop_in import GRU, LSTM, RNN
from fusecell.errors import ExportError
from fusecell.onnx.recurrent_nodes import GATES, reordered

__all__ = ["load"]

Array = npt.NDArray[Any]
_LAYERS = {"GRU": GRU, "LSTM": LSTM, "RNN": RNN}
_ACTIVATIONS = {"GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"], "RNN": ["Tanh"]}
_UNSUPPORTED = {"clip": "a clip of its gates", "input_forget": "coupled input and forget gates"}


def load(source: str | os.PathLike[str] | onnx.ModelProto) -> dict[str, GRU | LSTM | RNN]:
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
        For each node of type GRU, LSTM or RNN a layer with one layer of cells, in the order of the graph. Nodes without
        a name are called after their first output. A layer takes (T, N, features), whatever the node's ``layout``.

    Raises:
        ExportError: for a node that no layer here computes, with the reason, and a model that has none.
    """
    model = source if isinstance(source, onnx.ModelProto) else onnx.load(Path(source))
    layers: dict[str, GRU | LSTM | RNN] = {}
    _collect(model.graph, {}, layers)
    if not layers:
        kinds = sorted({node.op_type for node in model.graph.node})
        raise ExportError(f"onnx.load: the model has no GRU, LSTM or RNN; it has {', '.join(kinds)}.")
    return layers


def _collect(graph: onnx.GraphProto, outer: Mapping[str, Array], layers: dict[str, GRU | LSTM | RNN]) -> None:
    constants = {**outer, **{each.name: numpy_helper.to_array(each) for each in graph.initializer}}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        elif node.op_type == "Identity" and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
        elif node.op_type in _LAYERS:
            name = node.name or next(output for output in node.output if output)
            layers[name] = _layer(node, name, constants)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    _collect(inner, constants, layers)


def _layer(node: onnx.NodeProto, name: str, constants: Mapping[str, Array]) -> GRU | LSTM | RNN:
    kind = node.op_type
    attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    for attribute, what in _UNSUPPORTED.items():
        if attributes.get(attribute):
            raise ExportError(f"onnx.load: {kind} {name} has {what}, which no layer here has.")
    inputs = [*node.input, *[""] * (8 - len(node.input))]
    if kind == "LSTM" and inputs[7]:
        raise ExportError(f"onnx.load: LSTM {name} has peepholes; fusecell.PeepholeLSTMCell has others per unit.")
    w, r = (_constant(node, name, constants, at) for at in (1, 2))
    b = _constant(node, name, constants, 3) if inputs[3] else None
    direction = attributes.get("direction", b"forward").decode()
    if direction == "reverse":
        raise ExportError(
            f"onnx.load: {kind} {name} runs backwards only; use fusecell.Recurrent(cell, reverse=True) with the "
            'weights of fusecell.onnx.load of the node with direction="forward".'
        )
    options: dict[str, Any] = {"bias": b is not None, "bidirectional": direction == "bidirectional"}
    options |= _activations(kind, name, attributes, len(w))
    if kind == "GRU" and not attributes.get("linear_before_reset", 0):
        options["reset_after"] = False
    hidden = r.shape[-1]
    dtype = torch.from_numpy(w).dtype
    layer: Any = _LAYERS[kind](w.shape[-1], hidden, dtype=dtype, **options)
    with torch.no_grad():
        for at, suffix in enumerate(("_l0", "_l0_reverse")[: len(w)]):
            parts = {"weight_ih": w[at], "weight_hh": r[at]}
            if b is not None:
                parts["bias_ih"], parts["bias_hh"] = np.split(b[at], 2)
            for part, value in parts.items():
                order = np.argsort(GATES[kind])
                getattr(layer, part + suffix).copy_(torch.from_numpy(reordered(value, [int(i) for i in order])))
    return layer  # type: ignore[no-any-return]


def _constant(node: onnx.NodeProto, name: str, constants: Mapping[str, Array], at: int) -> Array:
    value = constants.get(node.input[at])
    if value is None:
        raise ExportError(
            f"onnx.load: {node.op_type} {name} computes its {'XWRB'[at]} in the model; only constants are loaded. Fold "
            "them first, with onnxruntime's or onnxsim's optimiser."
        )
    return np.array(value)


def _activations(kind: str, name: str, attributes: Mapping[str, Any], directions: int) -> dict[str, Any]:
    given = [each.decode() for each in attributes.get("activations", [])]
    if not given or given == _ACTIVATIONS[kind] * directions:
        return {}
    if kind == "RNN" and given == ["Relu"] * directions:
        return {"nonlinearity": "relu"}
    raise ExportError(f"onnx.load: {kind} {name} has the activations {', '.join(given)}, which no layer here has.")
