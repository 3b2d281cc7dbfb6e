"""Writer of the nodes and constants of one ONNX graph: of a model, or of the body of a Scan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["INT64", "Array", "Writer"]

Array = npt.NDArray[Any]
INT64 = TensorProto.INT64


class Writer:
    """The nodes and constants so far; methods add a node and return the name of its result.

    Arguments:
        dtype: of all numbers that are no integers.
        outer: the writer of the graph around this one, whose names it must not use again.
    """

    def __init__(self, dtype: np.dtype[Any], outer: Writer | None = None) -> None:
        self.dtype = dtype
        self.element = helper.np_dtype_to_tensor_dtype(dtype)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self._names: set[str] = set() if outer is None else outer._names
        self._by_value: dict[tuple[Any, ...], str] = {}

    def name(self, wanted: str) -> str:
        """Return a name that no value has yet."""
        unique, count = wanted, 0
        while unique in self._names:
            count += 1
            unique = f"{wanted}_{count}"
        self._names.add(unique)
        return unique

    def node(self, op: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Add a node with one result."""
        result = self.name(name or op.lower())
        self.nodes.append(helper.make_node(op, list(inputs), [result], name=result, **attributes))
        return result

    def several(self, op: str, inputs: Sequence[str], results: Iterable[str], **attributes: Any) -> list[str]:
        """Add a node with several results, of which "" are left out."""
        names = [self.name(result) if result else "" for result in results]
        label = next(name for name in names if name)
        self.nodes.append(helper.make_node(op, list(inputs), names, name=f"{label}_{op}", **attributes))
        return names

    def constant(self, value: Array | Sequence[float] | float, name: str = "constant") -> str:
        """Add numbers in the graph's own dtype; equal ones are added once."""
        return self.raw(np.asarray(value).astype(self.dtype), name)

    def integers(self, value: Array | Sequence[int] | int, name: str = "integers") -> str:
        """Add int64 numbers, such as a shape or positions."""
        return self.raw(np.asarray(value, dtype=np.int64), name)

    def raw(self, value: Array, name: str) -> str:
        """Add numbers in the dtype that they have."""
        key = value.dtype.str, value.shape, value.tobytes()
        if key not in self._by_value:
            result = self.name(name)
            self.constants.append(numpy_helper.from_array(np.array(value, order="C"), result))
            self._by_value[key] = result
        return self._by_value[key]

    # what nearly every rule needs

    def reshape(self, value: str, *sizes: int) -> str:
        """Reshape; 0 keeps a dimension, -1 is what is left."""
        return self.node("Reshape", value, self.integers(sizes, "shape"))

    def cast(self, value: str, element: int | None = None) -> str:
        return self.node("Cast", value, to=self.element if element is None else element)

    def slice(self, value: str, start: int, stop: int, axis: int, step: int = 1) -> str:
        bounds = [self.integers([number], "bound") for number in (start, stop, axis, step)]
        return self.node("Slice", value, *bounds)

    def flipped(self, value: str, axis: int) -> str:
        """Reverse the order along an axis."""
        return self.slice(value, -1, np.iinfo(np.int64).min, axis, -1)

    def reduced(self, op: str, value: str, axis: int, keep: bool) -> str:
        return self.node(op, value, self.integers([axis], "axes"), keepdims=int(keep))
