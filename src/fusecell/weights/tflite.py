"""Files of TensorFlow Lite: the recurrent and dense layers in a converted model.

A converter writes an LSTM of older Keras as one operator, and every other recurrent layer as a while loop, whose body
is the step: operators, two of them products with the kernels. The weights are found by what these multiply, the step's
input or its state, and the body is then computed, in NumPy, and compared with the cell that the weights are put into.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusecell.cells import GRUCell, LSTMCell, RNNCell
from fusecell.weights.cell_weights import Array, CellWeights, DenseWeights, parts_of
from fusecell.weights.keras import cell_from_keras

__all__ = ["from_tflite"]

_DTYPES = {0: np.float32, 1: np.float16, 2: np.int32, 4: np.int64, 9: np.int8}
"""NumPy's, by the schema's TensorType."""
_MOVES = frozenset({"RESHAPE", "TRANSPOSE", "REVERSE_V2", "DEQUANTIZE", "SQUEEZE", "EXPAND_DIMS"})
_ACTIVATIONS: Mapping[int, Callable[[Array], Array]] = {0: lambda x: x, 1: lambda x: np.maximum(x, 0), 4: np.tanh}
"""What an operator may apply to its result, by the schema's ActivationFunctionType."""
_TOLERANCE = 1e-4


def from_tflite(path: Path) -> Iterator[CellWeights | DenseWeights]:
    """Iterate over the layers in a file, in the order in which they are applied, forward before backward.

    Raises:
        ModuleNotFoundError: if the package tflite is not installed.
        ValueError: for a file of another kind, or one with weights that no such layer has.
    """
    try:
        import tflite
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "weights.load reads the files of TensorFlow Lite with the package tflite: pip install tflite."
        ) from error
    try:
        model = _Model(tflite, path)
        layers = list(model.layers())
    except (struct.error, IndexError, KeyError, TypeError, UnicodeDecodeError, MemoryError, OverflowError) as error:
        raise ValueError(f"{path.name} is no model of TensorFlow Lite, or is damaged: {error}.") from error
    if not layers:
        raise ValueError(f"{path.name} has no recurrent and no dense layer.")
    for position, (first, second) in enumerate(pairwise(layers)):
        if first.is_reversed and not second.is_reversed and first.source == second.source:
            layers[position : position + 2] = [second, first]
    yield from (layer.weights for layer in layers)


@dataclass(frozen=True)
class _Layer:
    """Weights, the tensor that they are applied to, and whether from its end."""

    weights: CellWeights | DenseWeights
    source: int
    is_reversed: bool = False


@dataclass(frozen=True)
class _Operator:
    """One operator of a subgraph.

    Attributes:
        name: its name in the schema, ``"FULLY_CONNECTED"``.
        inputs, outputs: numbers of tensors, -1 for an input that is left out.
        options: the schema's table of its attributes, not read yet; None if it has none.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Any


class _Subgraph:
    """The operators of a model's main graph, or of a loop's body."""

    def __init__(self, tflite: Any, model: Any, number: int) -> None:
        self._model = model
        self._graph = graph = model.Subgraphs(number)
        names = {code: name for name, code in vars(tflite.BuiltinOperator).items() if isinstance(code, int)}
        self.operators = []
        for each in map(graph.Operators, range(_count(graph, "Operators"))):
            code = model.OperatorCodes(each.OpcodeIndex())
            name = names.get(max(code.BuiltinCode(), code.DeprecatedBuiltinCode()), "an unknown operator")
            self.operators.append(_Operator(name, _numbers(each, "Inputs"), _numbers(each, "Outputs"), _options(each)))
        self.inputs, self.outputs = _numbers(graph, "Inputs"), _numbers(graph, "Outputs")
        self.makers = {tensor: each for each in self.operators for tensor in each.outputs}

    def shape(self, tensor: int) -> tuple[int, ...]:
        return _numbers(self._graph.Tensors(tensor), "Shape")

    def constant(self, tensor: int) -> Array | None:
        """Return the value of a tensor that is in the file, as numbers; None if it is computed, or left out."""
        if tensor < 0:
            return None
        maker = self.makers.get(tensor)
        if maker is not None:
            return self.constant(maker.inputs[0]) if maker.name == "DEQUANTIZE" else None
        about = self._graph.Tensors(tensor)
        buffer = self._model.Buffers(about.Buffer())
        if not buffer.DataLength():
            return None
        values = np.frombuffer(buffer.DataAsNumpy().tobytes(), _DTYPES[about.Type()]).copy()
        if values.size != math.prod(self.shape(tensor)):
            raise ValueError(f"tensor {tensor} has {values.size} numbers, and the shape {self.shape(tensor)}.")
        values = values.reshape(self.shape(tensor))
        return _dequantised(values, about.Quantization()) if values.dtype in (np.int8, np.float16) else values

    def origin(self, tensor: int) -> tuple[int, bool]:
        """Return what a tensor is another order of, and whether that of time is turned round."""
        turns = 0
        while (maker := self.makers.get(tensor)) is not None and maker.name in _MOVES:
            turns += maker.name == "REVERSE_V2"
            tensor = maker.inputs[0]
        return tensor, turns % 2 == 1


def _count(table: Any, name: str) -> int:
    """Return the length of a vector, which is no longer than the file."""
    count = int(getattr(table, f"{name}Length")())
    if count > len(table._tab.Bytes):
        raise ValueError(f"a vector of {count:,} {name.lower()}, in a file of {len(table._tab.Bytes):,} bytes.")
    return count


def _numbers(table: Any, name: str) -> tuple[int, ...]:
    """Return a vector of integers."""
    return tuple([int(getattr(table, name)(at)) for at in range(_count(table, name))])


def _options(operator: Any) -> Any:
    return operator.BuiltinOptions()


def _read(kind: type[Any], options: Any) -> Any:
    """Return an operator's attributes as the schema's table of a kind."""
    table = kind()
    table.Init(options.Bytes, options.Pos)
    return table


def _dequantised(values: Array, about: Any) -> Array:
    numbers = values.astype(np.float32)
    if about is None or not about.ScaleLength():
        return numbers
    scale, zero = about.ScaleAsNumpy(), about.ZeroPointAsNumpy()
    along = [1] * numbers.ndim
    if len(scale) > 1:
        along[about.QuantizedDimension()] = len(scale)
    result: Array = (numbers - np.reshape(zero, along)) * np.reshape(scale, along)
    return result.astype(np.float32)


class _Model:
    """A model: its main graph's layers, and the bodies of its loops."""

    def __init__(self, tflite: Any, path: Path) -> None:
        data = path.read_bytes()
        if data[4:8] != b"TFL3":
            raise ValueError(f"{path.name} is no model of TensorFlow Lite: bytes 4 to 8 are {data[4:8]!r}, not TFL3.")
        self._tflite, self._model = tflite, tflite.Model.GetRootAs(data, 0)
        self._main = _Subgraph(tflite, self._model, 0)

    def layers(self) -> Iterator[_Layer]:
        """Iterate over what has weights, in the order of the file."""
        main = self._main
        for place, operator in enumerate(main.operators):
            name = f"operator {place} ({operator.name})"
            if operator.name == "WHILE":
                yield self._loop(operator, name)
            elif operator.name == "UNIDIRECTIONAL_SEQUENCE_LSTM":
                yield _fused_lstm(main, operator, name)
            elif operator.name == "FULLY_CONNECTED":
                options = _read(self._tflite.FullyConnectedOptions, operator.options)
                if options.FusedActivationFunction():
                    raise ValueError(f"weights.load: {name} has an activation; put it behind a Linear.")
                weight, bias = main.constant(operator.inputs[1]), main.constant(operator.inputs[2])
                if weight is None:
                    raise ValueError(f"weights.load: {name} multiplies by what is computed.")
                yield _Layer(DenseWeights(weight, bias, name), main.origin(operator.inputs[0])[0])
            else:
                values = [main.constant(tensor) for tensor in operator.inputs if operator.name != "DEQUANTIZE"]
                if any(value is not None and value.dtype == np.float32 and value.size > 1 for value in values):
                    raise ValueError(
                        f"weights.load: {name} has weights and no counterpart here; recurrent and dense layers are "
                        "read, but an LSTM, a GRU and an RNN that is unrolled."
                    )

    def _loop(self, operator: _Operator, name: str) -> _Layer:
        """Return the layer that a while loop is."""
        number = _read(self._tflite.WhileOptions, operator.options).BodySubgraphIndex()
        body = _Body(self._tflite, _Subgraph(self._tflite, self._model, number), name)
        for place in body.state_places:
            start = self._main.constant(operator.inputs[place])
            if start is None or start.any():
                raise ValueError(f"weights.load: {name} begins with a state that isn't zeros.")
        weights = body.weights()
        body.check(weights)
        return _Layer(weights, *self._main.origin(operator.inputs[body.sequence_place]))


def _fused_lstm(graph: _Subgraph, operator: _Operator, name: str) -> _Layer:
    """Return the layer of the operator that is a whole LSTM: its gates are i, f, g, o, as torch.nn's."""
    values: Any = [graph.constant(tensor) for tensor in operator.inputs]
    if any(value is not None for value in (*values[9:12], *values[16:18], *values[20:])):
        raise ValueError(f"weights.load: {name} has peepholes, a projection or a layer norm, which LSTM lacks.")
    if any(value is None for value in (*values[1:9], *values[12:16])):
        raise ValueError(f"weights.load: {name} lacks a gate.")
    of_inputs, recurrent, biases = (np.concatenate(values[a:b]) for a, b in ((1, 5), (5, 9), (12, 16)))
    return _Layer(CellWeights("LSTM", of_inputs, recurrent, biases, name=name), *graph.origin(operator.inputs[0]))


class _Body:
    """The body of a loop: a step of a recurrent layer.

    Attributes:
        sequence_place: the place of the whole sequence among what the loop carries.
        state_places: those of the states: h, and c of an LSTM.
    """

    def __init__(self, tflite: Any, graph: _Subgraph, name: str) -> None:
        self._tflite, self._graph, self._name = tflite, graph, name
        gathers = [each for each in graph.operators if each.name == "GATHER" and each.inputs[0] in graph.inputs]
        if len(gathers) != 1:
            raise ValueError(f"weights.load: {name} is a loop that is no recurrent layer.")
        self._x = gathers[0].outputs[0]
        self._sequence = gathers[0].inputs[0]
        self.sequence_place = graph.inputs.index(self._sequence)
        products = [each for each in graph.operators if each.name == "FULLY_CONNECTED"]
        self._of_x = [each for each in products if graph.origin(each.inputs[0])[0] == self._x]
        self._of_h = [each for each in products if each not in self._of_x]
        if len(self._of_x) != 1 or len(self._of_h) not in (1, 2):
            raise ValueError(
                f"weights.load: {name} is a loop of {len(self._of_x)} products with the input and {len(self._of_h)} "
                "others; a GRU, LSTM or RNN has one with its input and one with its state."
            )
        hidden = graph.shape(self._of_h[0].inputs[0])
        self._states = [each for each in graph.inputs if len(graph.shape(each)) == 2 and graph.shape(each) == hidden]
        h = self._of_h[0].inputs[0]
        self._states.sort(key=lambda tensor: tensor != h)
        self.state_places = [graph.inputs.index(each) for each in self._states]

    def weights(self) -> CellWeights:
        """Return the weights: their kind is that of as many gates."""
        kernel, bias = self._product(self._of_x[0])
        pairs = [self._product(each) for each in self._of_h]
        recurrent = np.concatenate([weight for weight, _ in pairs])
        biases = [other for _, other in pairs if other is not None]
        tensors = [kernel.T, recurrent.T]
        gates, size = len(recurrent) // recurrent.shape[1], recurrent.shape[1]
        zeros = np.zeros(gates * size, np.float32)
        after = gates == 3 and len(self._of_h) == 1
        if after:
            tensors.append(np.stack([zeros if bias is None else bias, biases[0] if biases else zeros]))
        else:
            both = [zeros, *([] if bias is None else [bias]), *(biases if len(pairs) == 1 else ())]
            tensors.append(np.sum(both, axis=0))
        weights = cell_from_keras(tensors, self._name)
        if weights.kind != "RNN":
            return weights
        names = {each.name for each in self._graph.operators}
        return CellWeights(**{**vars(weights), "nonlinearity": "tanh" if "TANH" in names else "relu"})

    def _product(self, operator: _Operator) -> tuple[Array, Array | None]:
        """Return a product's weight and bias, which may be an addition of its own."""
        graph = self._graph
        weight = graph.constant(operator.inputs[1])
        if weight is None:
            raise ValueError(f"weights.load: {self._name} multiplies by what is computed.")
        bias = graph.constant(operator.inputs[2]) if len(operator.inputs) > 2 else None
        if bias is not None or operator not in self._of_x:
            return weight, bias
        constants = [graph.constant(each) for op in graph.operators if op.name == "ADD" for each in op.inputs]
        added = [each for each in constants if each is not None and each.size == len(weight) and each.dtype != np.int32]
        return weight, added[0].reshape(-1) if len(added) == 1 else None

    def check(self, weights: CellWeights) -> None:
        """Raise ValueError unless the body computes what the cell of the weights does."""
        inputs, size = weights.weight_ih.shape[1], weights.hidden_size
        kinds: dict[str, tuple[Any, dict[str, Any]]] = {
            "GRU": (GRUCell, {"reset_after": weights.reset_after}),
            "LSTM": (LSTMCell, {}),
            "RNN": (RNNCell, {"nonlinearity": weights.nonlinearity}),
        }
        kind, options = kinds[weights.kind]
        cell = kind(inputs, size, **options)
        next(parts_of(cell)).write(weights)
        if len(self._states) != len(cell.states):
            raise ValueError(f"weights.load: {self._name} carries {len(self._states)} states, a {weights.kind} others.")
        rng = np.random.default_rng(0)
        x = rng.standard_normal((1, inputs)).astype(np.float32)
        states = [rng.uniform(-0.9, 0.9, (1, size)).astype(np.float32) for _ in self._states]
        values: dict[int, Array] = {self._x: x, **dict(zip(self._states, states, strict=True))}
        results = [self._graph.outputs[place] for place in self.state_places]
        with np.errstate(all="ignore"):  # of weights that no training gave
            computed = _evaluate(self._tflite, self._graph, values, results, self._name)
        with torch.no_grad():
            _, expected = cell.step(torch.from_numpy(x), tuple(map(torch.from_numpy, states)))
        for one, other in zip(computed, expected, strict=True):
            if one.shape != other.shape or not np.abs(one - other.numpy()).max() <= _TOLERANCE:
                raise ValueError(
                    f"weights.load: {self._name} computes something else than a {weights.kind}: other activations, or "
                    "another order of gates."
                )


def _evaluate(
    tflite: Any, graph: _Subgraph, values: dict[int, Array], results: Sequence[int], name: str
) -> list[Array]:
    """Compute some tensors of a graph, given others."""
    needed, pending = set(results), list(results)
    while pending:
        tensor = pending.pop()
        maker = graph.makers.get(tensor)
        if tensor not in values and maker is not None:
            fresh = [each for each in maker.inputs if each >= 0 and each not in needed]
            needed.update(fresh)
            pending += fresh
    for operator in graph.operators:
        if operator.outputs[0] in values or not needed.intersection(operator.outputs):
            continue
        args = [values[each] if each in values else graph.constant(each) for each in operator.inputs]
        if any(arg is None for arg in args[:2]):  # a product's bias, the third, may be left out
            raise ValueError(f"weights.load: {name} has a step that reads what it doesn't compute.")
        computed = _RULES.get(operator.name)
        if computed is None:
            raise ValueError(f"weights.load: {name} has the operator {operator.name} in its step.")
        values.update(zip(operator.outputs, computed(tflite, operator, args), strict=True))
    return [values[each] for each in results]


def _fused(kind: str, function: Callable[..., Array]) -> Callable[..., list[Array]]:
    """Return the rule of an operator that may apply an activation to its result."""

    def rule(tflite: Any, operator: _Operator, args: Sequence[Any]) -> list[Array]:
        activation = _read(getattr(tflite, kind), operator.options).FusedActivationFunction()
        return [_ACTIVATIONS[activation](function(*args))]

    return rule


def _plain(function: Callable[..., Array]) -> Callable[..., list[Array]]:
    return lambda tflite, operator, args: [function(*args)]


def _product(x: Array, weight: Array, bias: Array | None = None) -> Array:
    product: Array = x @ weight.T
    return product if bias is None else product + bias


def _split(tflite: Any, operator: _Operator, args: Sequence[Any]) -> list[Array]:
    return np.split(args[1], len(operator.outputs), axis=int(args[0]))


def _strided_slice(tflite: Any, operator: _Operator, args: Sequence[Any]) -> list[Array]:
    value, begin, end, strides = args
    options = _read(tflite.StridedSliceOptions, operator.options)
    places = [
        slice(
            None if options.BeginMask() >> axis & 1 else int(begin[axis]),
            None if options.EndMask() >> axis & 1 else int(end[axis]),
            int(strides[axis]),
        )
        for axis in range(len(begin))
    ]
    return [value[tuple(places)]]


_RULES: Mapping[str, Callable[..., list[Array]]] = {
    "ADD": _fused("AddOptions", np.add),
    "SUB": _fused("SubOptions", np.subtract),
    "MUL": _fused("MulOptions", np.multiply),
    "FULLY_CONNECTED": _fused("FullyConnectedOptions", _product),
    "LOGISTIC": _plain(lambda x: 1 / (1 + np.exp(-x))),
    "TANH": _plain(np.tanh),
    "RELU": _plain(lambda x: np.maximum(x, 0)),
    "RESHAPE": _plain(lambda x, shape: x.reshape(shape)),
    "DEQUANTIZE": _plain(lambda x: x),
    "SPLIT": _split,
    "STRIDED_SLICE": _strided_slice,
}
