"""A stream in a file: tensors by safetensors, each step's graph as its canonical text, and a checksum of both.

What is read is checked before it is used: the text is parsed into primitives, types and sizes, and every tensor must
fit them. A file can't hold code, so a hostile one computes something else at worst.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fusecell.compiler.ir.graph import SAVED, Graph
from fusecell.compiler.runtime.kernel import compile_graph
from fusecell.errors import CompilerError, FusecellError
from fusecell.streaming.bound_step import Array, Part
from fusecell.streaming.stream import Stream

__all__ = ["StreamFileError", "digest", "load_stream", "write"]

_FORMAT = "fusecell stream 1"
_MOST_FEATURES = 1 << 24


class StreamFileError(FusecellError, ValueError):
    """A file is not a stream that was saved, or is damaged."""


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


def load_stream(path: str | Path, batch_size: int = 1) -> Stream:
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

    Raises:
        OSError: if it can't be read.
        StreamFileError: if it is no such file, or damaged; a ValueError.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"load_stream takes a batch_size of 1 or more, got {batch_size!r}.")
    described, tensors = _read(Path(path))
    parts = []
    for place, entry in enumerate(described):
        try:
            parts.append(_part(place, entry, tensors, batch_size))
        except (CompilerError, LookupError, TypeError, AttributeError) as error:
            raise StreamFileError(f"{path}: its step {place} can't be read: {error}") from error
    _check_chain(path, parts)
    return Stream.of_parts(parts, batch_size)


def _read(path: Path) -> tuple[list[Any], dict[str, Array]]:
    """The parts' descriptions and all tensors."""
    from safetensors import SafetensorError, safe_open

    with path.open("rb"):  # an OSError of its own words if it isn't there or can't be read
        pass
    try:
        with safe_open(path, framework="np") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except SafetensorError as error:
        raise StreamFileError(f"{path} is not a saved stream, or is damaged: {error}") from error
    if about.get("format") != _FORMAT:
        raise StreamFileError(
            f"{path} is not a stream of this version of fusecell: its format is {about.get('format')!r}, "
            f"expected {_FORMAT!r}."
        )
    if about.get("sha256") != digest(about.get("parts", ""), tensors):
        raise StreamFileError(f"{path} is damaged: its content is not what its checksum says. Save the stream again.")
    try:
        described = json.loads(about.get("parts", ""))
    except (ValueError, RecursionError) as error:
        raise StreamFileError(f"{path} is damaged: {error}") from error
    if not isinstance(described, list) or not described:
        raise StreamFileError(f"{path} is damaged: it describes no steps.")
    return described, tensors


def _part(place: int, entry: Any, tensors: Mapping[str, Array], rows: int) -> Part:
    graph = Graph.parse(str(entry["graph"]))
    dtype = np.dtype(np.float32 if graph.dtype == "f32" else np.float64)
    _check_graph(graph)
    leaves = [graph[index].type.shape for index in graph.leaves("weight")]
    weights = [_tensor(tensors, f"{place}.weight.{i}", shape, dtype) for i, shape in enumerate(leaves)]
    sizes = [graph[index].size for index in graph.leaves("state")]
    start = [_tensor(tensors, f"{place}.start.{i}", (1, size), dtype) for i, size in enumerate(sizes)]
    return Part(
        str(entry["kind"]),
        graph,
        compile_graph(graph, about=f"{entry['kind']}, saved stream"),
        weights,
        [value.repeat(rows, 0) for value in start],
    )


def _check_graph(graph: Graph) -> None:
    """Whether it is a step that a stream can run: one input, an output, states, and nothing of a backward."""
    inputs = graph.leaves("input")
    if len(inputs) != 1:
        raise CompilerError(f"a stream's step has one input, this has {len(inputs)}")
    states = [f"state.{graph[index].name}" for index in graph.leaves("state")]
    expected = {"output", *states}
    if set(graph.outputs) != expected:
        raise CompilerError(f"its results are {sorted(graph.outputs)}, expected {sorted(expected)}")
    for _, node in graph:
        size = int(np.prod(node.type.shape, dtype=np.float64))
        if size > _MOST_FEATURES * (_MOST_FEATURES if node.type.kind == "weight" else 1) or node.name.startswith(SAVED):
            raise CompilerError(f"{node.name} of type {node.type} has no place in a step")


def _tensor(tensors: Mapping[str, Array], name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    if name not in tensors:
        raise CompilerError(f"{name} is missing")
    found = tensors[name]
    if found.shape != shape or found.dtype != dtype:
        raise CompilerError(f"{name} is {found.dtype} of shape {found.shape}, expected {dtype} of shape {shape}")
    return found


def _check_chain(path: str | Path, parts: Sequence[Part]) -> None:
    for below, above in pairwise(parts):
        if below.output_size != above.input_size or below.dtype != above.dtype:
            raise StreamFileError(
                f"{path}: {below.kind} gives {below.output_size} features in {below.dtype}, {above.kind} above it "
                f"takes {above.input_size} in {above.dtype}."
            )
