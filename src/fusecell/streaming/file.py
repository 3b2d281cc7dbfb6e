"""A stream in a file: tensors by safetensors, each step's graph as its canonical text, and a checksum of both.

What is read is checked before it is used: the text is parsed into primitives, types and sizes, and every tensor must
fit them, within limits. A file can't hold code, so a hostile one computes something else at worst.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fusecell.compiler.ir.contract import GraphLimits, check_graph
from fusecell.compiler.ir.graph import SAVED, Graph
from fusecell.compiler.ir.primitives import region
from fusecell.compiler.runtime.kernel import Kernel, compile_graph
from fusecell.errors import CompilerError, StreamFileError, quoted
from fusecell.streaming.bound_step import MOST_STEPS, Array, Part
from fusecell.streaming.limits import Limits
from fusecell.streaming.stream import Stream
from fusecell.strict_json import parse_json
from fusecell.tensor_file import TensorFile, read_tensor_file

__all__ = ["StreamFileError", "digest", "load_stream", "write"]

_FORMAT = "fusecell stream 1"
_DEFAULT_LIMITS = Limits()


def write(parts: Sequence[Part], path: str | Path) -> None:
    """Write a stream's parts."""
    from safetensors.numpy import save

    tensors: dict[str, Array] = {}
    described = []
    for place, part in enumerate(parts):
        for index, value in enumerate(part.weights):
            tensors[f"{place}.weight.{index}"] = np.ascontiguousarray(value)
        for index, value in enumerate(part.start):
            tensors[f"{place}.start.{index}"] = np.ascontiguousarray(value[:1])
        described.append({"kind": part.kind, "graph": part.graph.text})
    text = json.dumps(described)
    about = {"format": _FORMAT, "parts": text, "sha256": digest(text, tensors)}
    # Beside its place and then into it: nobody finds half a file.
    beside = Path(f"{path}.{os.getpid()}.part")
    try:
        beside.write_bytes(save(tensors, about))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def digest(parts: str, tensors: Mapping[str, Array]) -> str:
    """What a file says of its own content, so that damage is found."""
    found = hashlib.sha256(parts.encode())
    for name in sorted(tensors):
        value = tensors[name]
        found.update(f"{name} {value.dtype} {value.shape}".encode())
        found.update(np.ascontiguousarray(value).data)
    return found.hexdigest()


def load_stream(path: str | Path, batch_size: int = 1, *, limits: Limits = _DEFAULT_LIMITS) -> Stream:
    """A stream that :meth:`fusecell.Stream.save` wrote, in its initial state; torch is not needed, nor imported.

    Example:
        >>> import tempfile, pathlib, numpy as np, fusecell as fc
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.fusecell"
        >>> fc.Stream(fc.GRU(5, 10)).save(path)
        >>> fc.load_stream(path).step(np.zeros(5, np.float32)).shape
        (10,)

    Arguments:
        path: the file.
        batch_size: rows that run side by side.
        limits: the most that the file may ask for, :class:`fusecell.streaming.Limits`; to be raised for a large
            model of a source that one trusts.

    Raises:
        OSError: if it can't be read.
        StreamFileError: if it is no such file, is damaged, or breaks a limit; a ValueError.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"load_stream takes a batch_size of 1 or more, got {batch_size!r}.")
    try:
        file = _read(Path(path), limits)
        described = _described(file.metadata, limits)
        # All is checked before anything is compiled.
        steps = _steps(described, file, limits)
        _check_chain(steps)
        parts: list[Part] = []
        code = limits.code_bytes
        for place, step in enumerate(steps):
            parts.append(_part(place, step, batch_size, limits, code))
            code -= len(parts[-1].kernel.emitted.text)
    except (CompilerError, ValueError) as error:
        raise StreamFileError(f"{path} is not a saved stream, or is damaged: {error}.") from error
    return Stream.of_parts(parts, batch_size)


class _Step(NamedTuple):
    """A part of a stream as its file has it: the cell's class, its step, its weights and first states of one row."""

    kind: str
    graph: Graph
    weights: list[Array]
    start: list[Array]


def _read(path: Path, limits: Limits) -> TensorFile:
    file = read_tensor_file(path, ("F32", "F64"), file_bytes=limits.file_bytes, header_bytes=limits.header_bytes)
    about = file.metadata
    if about.get("format") != _FORMAT:
        raise ValueError(f"its format is {quoted(about.get('format'))}, expected {_FORMAT!r}")
    if about.keys() != {"format", "parts", "sha256"}:
        raise ValueError(f"its metadata are {quoted(sorted(about))}, expected format, parts and sha256")
    return file


def _described(about: Mapping[str, str], limits: Limits) -> list[Any]:
    described = parse_json(about["parts"], 2)
    if not isinstance(described, list) or not described:
        raise ValueError("it describes no steps")
    if len(described) > limits.parts:
        raise ValueError(f"it has {len(described)} steps, more than the {limits.parts} that it may have")
    return described


def _steps(described: list[Any], file: TensorFile, limits: Limits) -> list[_Step]:
    """Each part's graph and tensors, checked."""
    tensors = file.arrays()
    if file.metadata["sha256"] != digest(file.metadata["parts"], tensors):
        raise ValueError("its content is not what its checksum says; save the stream again")
    steps: list[_Step] = []
    nodes, features, work = limits.nodes, limits.features, limits.multiply_adds
    for place, entry in enumerate(described):
        try:
            step = _step(place, entry, tensors, GraphLimits(nodes=nodes, features=features))
            nodes -= len(step.graph.nodes)
            features -= sum(node.type.shape[0] for _, node in step.graph if node.type.kind in ("row", "mask"))
            work -= _multiply_adds(step.graph)
            if work < 0:
                raise CompilerError(f"a step has more than {limits.multiply_adds:,} multiply-adds")
        except CompilerError as error:
            raise CompilerError(f"its step {place} can't be read: {error}") from error
        steps.append(step)
    if tensors:
        raise ValueError(f"no step takes its tensor {quoted(min(tensors))}")
    return steps


def _step(place: int, entry: Any, tensors: dict[str, Array], limits: GraphLimits) -> _Step:
    if not isinstance(entry, dict) or entry.keys() != {"kind", "graph"}:
        raise CompilerError(f"it is {quoted(entry)}, expected an object of kind and graph")
    kind, text = entry["kind"], entry["graph"]
    if not isinstance(kind, str) or not kind.isprintable() or not 0 < len(kind) <= 256:
        raise CompilerError(f"its kind is {quoted(kind)}, expected up to 256 characters that print")
    if not isinstance(text, str):
        raise CompilerError(f"its graph is {quoted(text)}, expected a text")
    if text.count("\n") > 2 * limits.nodes + 1:
        raise CompilerError(f"its graph has more lines than {max(limits.nodes, 0):,} values and results would take")
    graph = Graph.parse(text)
    check_graph(graph, "step", limits)
    _check_step(graph)
    dtype = np.dtype(np.float32 if graph.dtype == "f32" else np.float64)
    leaves = [graph[index].type.shape for index in graph.leaves("weight")]
    weights = [_tensor(tensors, f"{place}.weight.{i}", shape, dtype) for i, shape in enumerate(leaves)]
    sizes = [graph[index].size for index in graph.leaves("state")]
    start = [_tensor(tensors, f"{place}.start.{i}", (1, size), dtype) for i, size in enumerate(sizes)]
    return _Step(kind, graph, weights, start)


def _check_step(graph: Graph) -> None:
    """Whether it is a step that a stream can run: one input, an output, states, and nothing else."""
    inputs = [graph[index].name for index in graph.leaves("input")]
    if len(inputs) != 1 or inputs[0].startswith(SAVED):
        raise CompilerError(f"a stream's step has one input, this has {quoted(inputs)}")
    others = sorted(label for label in graph.outputs if label != "output" and not label.startswith("state."))
    if others:
        raise CompilerError(f"its results include {quoted(others)}, expected the output and the states alone")


def _multiply_adds(graph: Graph) -> int:
    """Of a step of one row, at the most."""
    total = 0
    for _, node in graph:
        if node.op == "product":
            depth, width = region(graph[node.args[1]].type, node.attrs)
            total += depth * width
        elif node.op == "affine":
            total += sum((term["rows"][1] - term["rows"][0]) * node.size for term in node.attrs["terms"])
    return total


def _tensor(tensors: dict[str, Array], name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    if name not in tensors:
        raise CompilerError(f"{name} is missing")
    found = tensors.pop(name)
    if found.shape != shape or found.dtype != dtype:
        raise CompilerError(f"{name} is {found.dtype} of shape {found.shape}, expected {dtype} of shape {shape}")
    return found


def _check_chain(steps: Sequence[_Step]) -> None:
    for below, above in pairwise(steps):
        (leaf,) = above.graph.leaves("input")
        output, taken = below.graph[below.graph.outputs["output"]].size, above.graph[leaf].size
        if output != taken or below.graph.dtype != above.graph.dtype:
            raise ValueError(
                f"{below.kind} gives {output} features in {below.graph.dtype}, {above.kind} above it "
                f"takes {taken} in {above.graph.dtype}"
            )


def _part(place: int, step: _Step, rows: int, limits: Limits, code_bytes: int) -> Part:
    try:
        kernel = compile_graph(step.graph, about=f"{step.kind}, saved stream", code_bytes=code_bytes)
    except (AssertionError, LookupError, RecursionError) as error:
        # A defect of the compiler's own: a graph that keeps the contract is one that it should take.
        name = type(error).__name__
        raise CompilerError(f"the compiler fails on its step {place}, please report it ({name}: {error})") from error
    _check_scratch(place, kernel, limits)
    return Part(step.kind, step.graph, kernel, step.weights, [value.repeat(rows, 0) for value in step.start])


def _check_scratch(place: int, kernel: Kernel, limits: Limits) -> None:
    size = kernel.emitted.scratch.bytes(1, kernel.chunk(MOST_STEPS, 1))
    if size > limits.scratch_bytes:
        raise CompilerError(
            f"its step {place} takes {size:,} bytes of memory to run in, more than the {limits.scratch_bytes:,} "
            "that it may have"
        )
