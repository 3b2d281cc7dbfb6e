"""Scan nodes as layers: the body becomes the step of a cell, its constants the cell's parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.errors import ExportError
from fusecell.execution.options import State
from fusecell.layers import Recurrent
from fusecell.onnx.operators import OPERATORS
from fusecell.shapes import feature_shape

__all__ = ["ScanCell", "scan_layer"]

Array = npt.NDArray[Any]
Constant = Callable[[str], Array | None]
_FLOATS = {onnx.TensorProto.FLOAT: torch.float32, onnx.TensorProto.DOUBLE: torch.float64}
_ROWS = 3


@dataclass(frozen=True)
class _Operation:
    """One node of a body: an operator, the names of its inputs and outputs, and its attributes."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


class ScanCell(Cell):
    """The body of an ONNX Scan node as a cell, whose constants are its parameters.

    Arguments:
        name: the node's, for messages.
        body: the body.
        constant: returns the value of a name from outside of it, None if that isn't constant.
        states: the number of its states, which come first among its inputs and outputs.
    """

    def __init__(self, name: str, body: onnx.GraphProto, constant: Constant, states: int) -> None:
        of_states = [_shape(name, each) for each in body.input[:states]]
        of_inputs = [_shape(name, each) for each in body.input[states:]]
        super().__init__(_size(of_inputs[0]), _size(of_states[0]))
        self.name = name
        self._argument_names = [each.name for each in body.input]
        self._result_names = [each.name for each in body.output]
        self.__dict__["states"] = tuple(_named(each.name) for each in body.input[:states])
        self.__dict__["inputs"] = tuple(_named(each.name) for each in body.input[states:])
        self.state_sizes = tuple(map(_size, of_states))
        self._input_shapes = of_inputs
        self._operations = [_operation(name, node) for node in body.node]
        self._attributes: dict[str, str] = {}
        self._numbers: dict[str, Any] = {}
        self._keep_constants(body, constant)
        self._sizes_of_outputs()

    def _keep_constants(self, body: onnx.GraphProto, constant: Constant) -> None:
        """Make parameters of the constants that are real numbers, and keep the others as they are."""
        inner = {each.name: numpy_helper.to_array(each) for each in body.initializer}
        inner |= {each.outputs[0]: each.attributes["value"] for each in self._operations if each.kind == "Constant"}
        self._operations = [each for each in self._operations if each.kind != "Constant"]
        known = {*self._argument_names, *(name for each in self._operations for name in each.outputs)}
        read = [name for each in self._operations for name in each.inputs]
        for name in dict.fromkeys([*read, *self._result_names]):
            if not name or name in known:
                continue
            value = inner.get(name)
            value = constant(name) if value is None else value
            if value is None:
                raise ExportError(
                    f"onnx.load: Scan {self.name} reads {name}, which is computed of the model's inputs: make it an "
                    "input of the Scan."
                )
            self._keep(name, np.asarray(value))

    def _keep(self, name: str, value: Array) -> None:
        if value.size == 1 and value.dtype.kind == "f":
            self._numbers[name] = float(value.reshape(-1)[0])
        elif value.dtype.kind == "f":
            attribute = _named(name)
            while hasattr(self, attribute):
                attribute += "_"
            wide = value.astype(np.float32) if value.dtype == np.float16 else value
            self.register_parameter(attribute, nn.Parameter(torch.from_numpy(np.array(wide))))
            self._attributes[name] = attribute
        else:
            self._numbers[name] = value

    def _sizes_of_outputs(self) -> None:
        """Run one step to learn the shapes of its outputs."""
        with torch.no_grad():
            x, state = self._random(torch.Generator().manual_seed(0))
            output, after = self._compute(x, state)
        for name, one, other in zip(self.states, state, after, strict=True):
            if one.shape != other.shape:
                raise ExportError(
                    f"onnx.load: Scan {self.name} gives its state {name} another shape in a step: {tuple(one.shape)} "
                    f"becomes {tuple(other.shape)}."
                )
        sizes = {_named(name): _size(tuple(value.shape[1:])) for name, value in output.items()}
        self.output_size = sizes if len(sizes) != 1 else next(iter(sizes.values()))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its parameters."""
        return next((value.dtype for value in self.parameters()), torch.float32)

    def _random(self, generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
        """Return random inputs and states of a few rows."""

        def random(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(_ROWS, *shape, generator=generator, dtype=self.dtype)

        return list(map(random, self._input_shapes)), [random(feature_shape(size)) for size in self.state_sizes]

    def step(self, x: Any, state: State) -> tuple[Any, State]:
        inputs = list(x) if len(self.inputs) > 1 else [x]
        for name, value, shape in zip(self.inputs, inputs, self._input_shapes, strict=True):
            if tuple(value.shape[1:]) != shape:
                wanted = ", ".join(map(str, ("N", *shape)))
                raise ValueError(f"Scan {self.name} takes {name} of shape ({wanted}), got {tuple(value.shape)}.")
        output, after = self._compute(inputs, list(state))
        if not output:
            return after[0], tuple(after)
        named = {_named(name): value for name, value in output.items()}
        return (named if len(named) > 1 else next(iter(named.values()))), tuple(after)

    def _compute(self, inputs: list[Tensor], state: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Run the operators of the body; return its outputs by name, and its states."""
        values: dict[str, Any] = dict(zip(self._argument_names, (*state, *inputs), strict=True))
        values |= self._numbers
        values |= {name: getattr(self, attribute) for name, attribute in self._attributes.items()}
        for each in self._operations:
            args = [values[name] if name else None for name in each.inputs]
            try:
                result = OPERATORS[each.kind](each.attributes, *args)
            except (TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
                raise ExportError(f"onnx.load: Scan {self.name} can't compute {each.name}: {error}") from error
            results = result if isinstance(result, list | tuple) else (result,)
            values.update(zip(each.outputs, results, strict=False))
        count = len(state)
        results = [values[name] for name in self._result_names]
        return dict(zip(self._result_names[count:], results[count:], strict=True)), results[:count]


def scan_layer(node: onnx.NodeProto, name: str, constant: Constant, opset: int) -> Recurrent:
    """Return a Scan node as a layer.

    Arguments:
        constant: returns the value of a name of the graph, None if that isn't constant.
        opset: the version of the operators.

    Raises:
        ExportError: for a node that no layer computes, with the reason.
    """
    attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    body, scanned = attributes["body"], int(attributes["num_scan_inputs"])
    states = len(node.input) - scanned
    if states < 1 or scanned < 1 or len(body.input) != len(node.input) or len(body.output) != len(node.output):
        raise ExportError(
            f"onnx.load: Scan {name} has {states} states and {scanned} inputs, its body {len(body.input)} inputs and "
            f"{len(body.output)} outputs; a layer has one state and one input at least."
        )
    outputs = len(node.output) - states
    reverse = _same(attributes, "scan_input_directions", scanned, "scan_output_directions", outputs, name)
    axis = _same(attributes, "scan_input_axes", scanned, "scan_output_axes", outputs, name)
    if axis not in (0, 1):
        raise ExportError(
            f"onnx.load: Scan {name} goes along axis {axis}; a layer's time is axis 0 or 1: transpose it."
        )
    cell = ScanCell(name, body, constant, states)
    _check(cell, body, constant, opset)
    return Recurrent(cell, reverse=bool(reverse), batch_first=axis == 1)


def _same(attributes: Mapping[str, Any], one: str, count: int, other: str, others: int, name: str) -> int:
    """Return what all inputs and all outputs of a Scan have in common."""
    values = {*attributes.get(one, [0] * count), *attributes.get(other, [0] * others)}
    if len(values) != 1:
        raise ExportError(
            f"onnx.load: Scan {name} has {one} {list(attributes.get(one, [0] * count))} and {other} "
            f"{list(attributes.get(other, [0] * others))}; in a layer they are all the same."
        )
    return int(values.pop())


def _operation(scan: str, node: onnx.NodeProto) -> _Operation:
    kind, name = str(node.op_type), node.name or next(iter(node.output), node.op_type)
    if kind != "Constant" and (kind not in OPERATORS or node.domain not in ("", "ai.onnx")):
        raise ExportError(
            f"onnx.load: Scan {scan} has the operator {kind} ({name}) in its body, which is not read; it may be "
            f"written with {', '.join(sorted(OPERATORS)[:6])} and {len(OPERATORS) - 6} others."
        )
    attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    attributes = {key: value.decode() if isinstance(value, bytes) else value for key, value in attributes.items()}
    if kind == "Constant":
        value = next(iter(attributes.values()))
        attributes = {"value": numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.array(value)}
    elif isinstance(attributes.get("value"), onnx.TensorProto):
        attributes["value"] = numpy_helper.to_array(attributes["value"])
    if kind == "Split":
        attributes.setdefault("outputs", len(node.output))
    return _Operation(kind, name, tuple(node.input), tuple(node.output), attributes)


def _shape(scan: str, value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """Return the features of a body's input, behind its rows."""
    kind = value.type.tensor_type
    if kind.elem_type not in _FLOATS and kind.elem_type != onnx.TensorProto.UNDEFINED:
        name = onnx.TensorProto.DataType.Name(kind.elem_type)
        raise ExportError(f"onnx.load: Scan {scan} takes {value.name} as {name}; layers take float32 and float64.")
    if not kind.HasField("shape"):
        raise ExportError(
            f"onnx.load: Scan {scan} doesn't say the shape of {value.name}: onnx.shape_inference.infer_shapes does."
        )
    dims = kind.shape.dim
    features = [int(each.dim_value) for each in dims[1:]]
    if not dims or min([1, *features]) < 1:
        raise ExportError(
            f"onnx.load: Scan {scan} takes {value.name} of shape ({', '.join(map(_dim, dims))}); a layer wants rows "
            "first and the number of features behind them."
        )
    if len(dims) == 1 and dims[0].dim_value:
        raise ExportError(
            f"onnx.load: Scan {scan} takes {value.name} of shape ({_dim(dims[0])},), without a dimension for rows: "
            "give it one, (N, features)."
        )
    return tuple(features)


def _dim(dim: Any) -> str:
    return str(dim.dim_param or dim.dim_value or "?")


def _size(shape: tuple[int, ...]) -> Any:
    return shape[0] if len(shape) == 1 else shape


def _named(name: str) -> str:
    """Return a name that Python takes as an attribute's."""
    cleaned = re.sub(r"\W", "_", name)
    return f"_{cleaned}" if not cleaned or cleaned[0].isdigit() else cleaned


def _check(cell: ScanCell, body: onnx.GraphProto, constant: Constant, opset: int) -> None:
    """Compare one step with ONNX's reference implementation."""
    inputs, state = cell._random(torch.Generator().manual_seed(1))
    captured = {name for node in body.node for name in node.input if name}
    inside = {each.name for each in (*body.input, *body.initializer)} | {o for node in body.node for o in node.output}
    feeds: dict[str, Any] = {name: constant(name) for name in captured - inside}
    feeds |= {name: v.numpy() for name, v in zip(cell._argument_names, (*state, *inputs), strict=True)}
    try:
        expected = ReferenceEvaluator(_as_model(body, feeds, opset)).run(None, feeds)
    except Exception as error:  # the reference's own, whatever it is
        raise ExportError(f"onnx.load: Scan {cell.name} can't be run by ONNX's reference: {error}") from error
    with torch.no_grad():
        output, after = cell._compute(inputs, state)
    for name, one, other in zip(cell._result_names, (*after, *output.values()), expected, strict=True):
        apart = np.abs(one.numpy() - other).max() if one.shape == np.shape(other) else np.inf
        if not apart <= 1e-3 * (1 + np.abs(other).max()):
            raise ExportError(
                f"onnx.load: Scan {cell.name} gives {name} that is {apart:.1e} from ONNX's reference; please report it."
            )


def _as_model(body: onnx.GraphProto, feeds: Mapping[str, Any], opset: int) -> onnx.ModelProto:
    """Return a body as a model, whose inputs are all that it reads."""
    graph = onnx.GraphProto()
    graph.CopyFrom(body)
    named = {each.name for each in graph.input}
    for name in feeds:
        if name not in named:
            graph.input.append(helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
