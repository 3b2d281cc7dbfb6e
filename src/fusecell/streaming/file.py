"""Save a stream to a file and load it: a safetensors file with each step's graph as text, and a checksum of both.

Everything is checked before it is used: the text is parsed into primitives, types and sizes, and every tensor must fit
them, within limits. Machine code, which a file may also have, can't be checked so: it is used only if the caller trusts
the file. Without it the worst that a hostile file does is to compute something else.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fusecell.compiler.ir.axes import AXIS_PRIMITIVES, work_of
from fusecell.compiler.ir.graph import SAVED, Graph, Node
from fusecell.compiler.ir.graph_contract import GraphLimits, check_graph
from fusecell.compiler.ir.primitives import region
from fusecell.compiler.ir.storage import Storage
from fusecell.compiler.runtime.guard_pages import ENABLED as CHECKING
from fusecell.compiler.runtime.kernel_calls import KernelCalls
from fusecell.errors import CompilerError, StreamFileError, quoted
from fusecell.streaming.bound_step import MOST_STEPS, Array, Part, RowShapes
from fusecell.streaming.limits import Limits
from fusecell.streaming.machine_code import StepCode, compile_code, misfit, read_code
from fusecell.streaming.row_layout import RowLayout
from fusecell.streaming.small_weights import UnreadableWeights, check_storage
from fusecell.streaming.stream import Stream
from fusecell.strict_json import parse_json
from fusecell.tensor_file import TensorFile, read_tensor_file

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["StreamFileError", "digest", "load_stream", "write"]

_FORMAT = "fusecell stream 1"
_DEFAULT_LIMITS = Limits()
_MOST_DIMS, _MOST_FEATURES = 16, 1 << 32


def write(parts: Sequence[Part], path: str | Path, code_for: Sequence[str] = ()) -> None:
    """Write a stream's parts to a file, with machine code for the CPUs of these names."""
    from pathlib import Path  # here and above for types only: to load a stream takes no more modules than it must

    try:
        from safetensors.numpy import save
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("To save a stream takes safetensors: pip install safetensors.") from error

    tensors: dict[str, Array] = {}
    described = []
    for place, part in enumerate(parts):
        leaves = part.graph.leaves("weight")
        for index, (leaf, value) in enumerate(zip(leaves, part.weights, strict=True)):
            stored = part.graph[leaf].attrs.get("stored")
            encoded = value if stored is None else Storage(stored).encode(value)
            tensors[f"{place}.weight.{index}"] = np.ascontiguousarray(encoded)
        for index, value in enumerate(part.start):
            tensors[f"{place}.start.{index}"] = np.ascontiguousarray(value[:1])
        entry: dict[str, Any] = {"kind": part.kind, "graph": part.graph.text}
        if part.shapes is not None:
            entry["shapes"] = part.shapes._asdict()
        described.append(entry)
    text = json.dumps(described)
    about = {"format": _FORMAT, "parts": text}
    if code_for:
        about["code"], images = compile_code([part.graph for part in parts], code_for)
        tensors |= images
    about["sha256"] = digest(text, tensors, about.get("code", ""))
    # Written under another name, then renamed, which is atomic: no reader ever sees half a file.
    temporary = Path(f"{path}.{os.getpid()}.part")
    try:
        temporary.write_bytes(save(tensors, about))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def digest(parts: str, tensors: Mapping[str, Array], code: str = "") -> str:
    """Return the checksum of a file's content: it finds damage, not forgery."""
    checksum = hashlib.sha256(parts.encode())
    checksum.update(code.encode())
    for name in sorted(tensors):
        value = tensors[name]
        checksum.update(f"{name} {value.dtype} {value.shape}".encode())
        checksum.update(np.ascontiguousarray(value).data)
    return checksum.hexdigest()


def load_stream(
    path: str | Path, batch_size: int = 1, *, limits: Limits = _DEFAULT_LIMITS, trusted: bool = False
) -> Stream:
    """Load a stream that :meth:`fusecell.Stream.save` wrote, in its initial state, without importing torch.

    Example:
        >>> import tempfile, pathlib, numpy as np, fusecell as fc
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.fusecell"
        >>> fc.Stream(fc.GRU(5, 10)).save(path)
        >>> fc.load_stream(path).step(np.zeros(5, np.float32)).shape
        (10,)

    Arguments:
        path: the file.
        batch_size: the number of rows, each with its own state.
        limits: the most that the file may ask for, :class:`fusecell.streaming.Limits`; raise them for a large model
            from a source that you trust.
        trusted: whether to run machine code that the file has, as ``save(path, code_for=...)`` writes it, if it fits
            this CPU; then nothing is compiled, and llvmlite not imported. **Machine code is a program: it can do
            whatever you can do.** The checksum finds damage and no forgery, so say True only of a file that is yours,
            or that came to you as safely as your programs do. By default the code in a file isn't looked at.

    Returns:
        The :class:`fusecell.Stream`.

    Raises:
        OSError: if the file can't be read, or the system lets no process execute memory that it has written.
        StreamFileError: if it is not a saved stream, is damaged, or exceeds a limit; a ValueError.
        ValueError: for a batch_size below 1.
        TypeError: if ``trusted`` is no bool.
        ModuleNotFoundError: if llvmlite isn't installed, and the file has no code for this CPU, or isn't trusted.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"load_stream takes a batch_size of 1 or more, got {batch_size!r}.")
    if not isinstance(trusted, bool):
        raise TypeError(f"load_stream takes True or False for trusted, got {quoted(trusted)}.")
    try:
        file = _read(path, limits)
        described = _described(file.metadata, limits)
        # All parts are checked before the first is compiled: a hostile file costs as little as possible.
        steps = _steps(described, file, limits)
        _check_chain(steps)
        parts = _parts(steps, batch_size, limits, _code_for_this_cpu(file, steps, limits, trusted=trusted))
    except UnreadableWeights as error:
        raise StreamFileError(f"{path} can't run here: {error}") from error
    except (CompilerError, ValueError) as error:
        raise StreamFileError(f"{path} is not a saved stream, or is damaged: {error}.") from error
    return Stream.of_parts(parts, batch_size)


class _Step(NamedTuple):
    """A part of a stream as read from a file.

    Its cell's class, its graph, weights, initial states of one row, and the shapes of a row unless all are flat.
    """

    kind: str
    graph: Graph
    weights: list[Array]
    start: list[Array]
    shapes: RowShapes | None


def _read(path: str | Path, limits: Limits) -> TensorFile:
    """Read the file and check its format and the names of its metadata."""
    file = read_tensor_file(
        path, ("F32", "F64", "U16", "F16", "I8"), file_bytes=limits.file_bytes, header_bytes=limits.header_bytes
    )
    about = file.metadata
    if about.get("format") != _FORMAT:
        raise ValueError(f"its format is {quoted(about.get('format'))}, expected {_FORMAT!r}")
    if about.keys() - {"code"} != {"format", "parts", "sha256"}:
        raise ValueError(f"its metadata are {quoted(sorted(about))}, expected format, parts, sha256 and perhaps code")
    return file


def _described(about: Mapping[str, str], limits: Limits) -> list[Any]:
    """Parse the list of parts."""
    described = parse_json(about["parts"], 5)
    if not isinstance(described, list) or not described:
        raise ValueError("it describes no steps")
    if len(described) > limits.parts:
        raise ValueError(f"it has {len(described)} steps, more than the {limits.parts} that it may have")
    return described


def _steps(described: list[Any], file: TensorFile, limits: Limits) -> list[_Step]:
    """Check the graph and the tensors of each part, against the checksum and within the limits."""
    tensors, about = file.arrays(), file.metadata
    if about["sha256"] != digest(about["parts"], tensors, about.get("code", "")):
        raise ValueError("its content is not what its checksum says; save the stream again")
    for name in [name for name in tensors if "code" in about and name.startswith("code.")]:
        del tensors[name]
    steps: list[_Step] = []
    nodes, features, work = limits.nodes, limits.features, limits.multiply_adds  # what is left for the next part
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
    """Check one part; take its tensors out of ``tensors``."""
    if not isinstance(entry, dict) or entry.keys() - {"shapes"} != {"kind", "graph"}:
        raise CompilerError(f"it is {quoted(entry)}, expected an object of kind and graph")
    kind, text = entry["kind"], entry["graph"]
    if not isinstance(kind, str) or not kind.isprintable() or not 0 < len(kind) <= 256:
        raise CompilerError(f"its kind is {quoted(kind)}, expected up to 256 characters that print")
    if not isinstance(text, str):
        raise CompilerError(f"its graph is {quoted(text)}, expected a text")
    # Before parsing, which takes time for each line; a value and a result take a line each.
    if text.count("\n") > 2 * limits.nodes + 1:
        raise CompilerError(f"its graph has more lines than {max(limits.nodes, 0):,} values and results would take")
    graph = Graph.parse(text)
    check_graph(graph, "step", limits)
    _check_step(graph)
    dtype = np.dtype(np.float32 if graph.dtype == "f32" else np.float64)
    weights = [
        _weight(tensors, f"{place}.weight.{i}", graph[leaf], dtype) for i, leaf in enumerate(graph.leaves("weight"))
    ]
    sizes = [graph[index].size for index in graph.leaves("state")]
    start = [_tensor(tensors, f"{place}.start.{i}", (1, size), dtype) for i, size in enumerate(sizes)]
    return _Step(kind, graph, weights, start, _row_shapes(entry["shapes"], graph) if "shapes" in entry else None)


def _row_shapes(entry: Any, graph: Graph) -> RowShapes:
    """Check the shapes of a row, which must have as many features as the graph's rows."""
    if not isinstance(entry, dict) or entry.keys() != {"input", "output", "states"}:
        raise CompilerError(f"its shapes are {quoted(entry)}, expected an object of input, output and states")
    inputs = [graph[leaf].size for leaf in graph.leaves("input")]
    states = [graph[index].size for index in graph.leaves("state")]
    if not isinstance(entry["states"], list) or len(entry["states"]) != len(states):
        raise CompilerError(f"its shapes of states are {quoted(entry['states'])}, expected {len(states)}")
    return RowShapes(
        _inputs(entry["input"], inputs),
        _outputs(entry["output"], graph[graph.outputs["output"]].size),
        tuple(_shape(shape, size) for shape, size in zip(entry["states"], states, strict=True)),
    )


def _inputs(entry: Any, sizes: Sequence[int]) -> RowLayout:
    """Check the shape of a row of the input, or of each of several."""
    if len(sizes) == 1:
        return _shape(entry, sizes[0])
    if not isinstance(entry, list) or len(entry) != len(sizes):
        raise CompilerError(f"the shapes of its inputs are {quoted(entry)}, expected {len(sizes)}")
    return tuple(_shape(shape, size) for shape, size in zip(entry, sizes, strict=True))


def _outputs(entry: Any, size: int) -> RowLayout:
    """Check the shape of a row of the output, or of each of several, which are side by side."""
    several: Any = entry.values() if isinstance(entry, dict) else entry
    if not isinstance(entry, dict | list) or not any(isinstance(shape, list) for shape in several):
        return _shape(entry, size)
    if len(several) > size:
        raise CompilerError(f"it has {len(several)} outputs of {size} features in all")
    shapes = tuple(_shape(shape, None) for shape in several)
    if sum(map(math.prod, shapes)) != size:
        raise CompilerError(f"the shapes of its outputs are {quoted(entry)}, expected {size} features in all")
    return dict(zip(entry, shapes, strict=True)) if isinstance(entry, dict) else shapes


def _shape(shape: Any, size: int | None) -> tuple[int, ...]:
    """Check the shape of a row of so many features, or of any number that there can be."""
    most = _MOST_FEATURES if size is None else size
    is_shape = isinstance(shape, list) and len(shape) <= _MOST_DIMS
    # A bool is an int to Python, and no dimension.
    is_shape = is_shape and all(type(dim) is int and 0 < dim <= most for dim in shape)
    if not is_shape or (size is not None and math.prod(shape) != size):
        number = "" if size is None else f" of {size} features in all"
        raise CompilerError(f"the shape of a row is {quoted(shape)}, expected dimensions{number}")
    return tuple(shape)


def _check_step(graph: Graph) -> None:
    """Raise CompilerError unless a graph has what a stream's step has: inputs, an output, and states."""
    inputs = [graph[index].name for index in graph.leaves("input")]
    if not inputs or any(name.startswith(SAVED) for name in inputs):
        raise CompilerError(f"a stream's step has the inputs {quoted(inputs)}, expected one or more of the caller's")
    others = sorted(label for label in graph.outputs if label != "output" and not label.startswith("state."))
    if others:
        raise CompilerError(f"its results include {quoted(others)}, expected the output and the states alone")


def _multiply_adds(graph: Graph) -> int:
    """Return an upper bound of the multiply-adds of a step of one row; nests count each element that they combine."""
    total = 0
    for _, node in graph:
        if node.op == "product":
            depth, width = region(graph[node.args[1]].type, node.attrs)
            total += depth * width
        elif node.op == "affine":
            total += sum((term["rows"][1] - term["rows"][0]) * node.size for term in node.attrs["terms"])
        elif node.op in AXIS_PRIMITIVES:
            total += work_of(node.op, [graph[arg].type for arg in node.args], node.attrs)
    return total


def _weight(tensors: dict[str, Array], name: str, leaf: Node, dtype: np.dtype[Any]) -> Array:
    """Take a weight out of ``tensors``, as the numbers that a kernel packs."""
    if "stored" not in leaf.attrs:
        return _tensor(tensors, name, leaf.type.shape, dtype)
    storage = Storage(leaf.attrs["stored"])
    return storage.decode(_tensor(tensors, name, leaf.type.shape, storage.dtype))


def _tensor(tensors: dict[str, Array], name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    if name not in tensors:
        raise CompilerError(f"{name} is missing")
    value = tensors.pop(name)
    if value.shape != shape or value.dtype != dtype:
        raise CompilerError(f"{name} is {value.dtype} of shape {value.shape}, expected {dtype} of shape {shape}")
    return value


def _check_chain(steps: Sequence[_Step]) -> None:
    """Raise ValueError unless each step takes the output of the one below."""
    for below, above in pairwise(steps):
        leaves = above.graph.leaves("input")
        if len(leaves) > 1:
            raise ValueError(f"{above.kind} above {below.kind} takes {len(leaves)} inputs, expected one")
        output, input = below.graph[below.graph.outputs["output"]].size, above.graph[leaves[0]].size
        if output != input or below.graph.dtype != above.graph.dtype:
            raise ValueError(
                f"{below.kind} gives {output} features in {below.graph.dtype}, {above.kind} above it "
                f"takes {input} in {above.graph.dtype}"
            )


def _code_for_this_cpu(
    file: TensorFile, steps: Sequence[_Step], limits: Limits, *, trusted: bool
) -> Sequence[StepCode | None]:
    """Return each step's machine code, or None for each that is to be compiled."""
    compiled = [None] * len(steps)
    # The check mode needs to know more of a kernel than a file has.
    if "code" not in file.metadata or not trusted or CHECKING:
        if importlib.util.find_spec("llvmlite") is None:
            why = "FUSECELL_CHECK is set, which runs compiled code alone" if trusted else "trusted=True isn't given"
            raise ModuleNotFoundError(_without_compiler(file, why))
        return compiled
    codes = read_code(file, [step.graph for step in steps], limits)
    fitting = [code for code in codes if not misfit(code)]
    if fitting:
        return max(fitting, key=lambda code: len(code.features)).steps
    if importlib.util.find_spec("llvmlite") is None:
        reasons = "; ".join(f"{code.target}: {misfit(code)}" for code in codes)
        raise ModuleNotFoundError(_without_compiler(file, f"none of it fits this machine ({reasons})"))
    return compiled


def _without_compiler(file: TensorFile, why: str) -> str:
    """Say why a stream can't run where llvmlite is not installed."""
    if "code" not in file.metadata:
        why = "The file has no machine code (Stream.save(path, code_for=[...]) writes it)"
    else:
        why = f"The file has machine code, but {why}"
    return (
        f"{why}, so it has to be compiled here, and llvmlite is not installed: pip install llvmlite. Machine code is "
        "a program that can do whatever you can do: load_stream(path, trusted=True) runs it, for a file that you trust."
    )


def _parts(steps: Sequence[_Step], rows: int, limits: Limits, codes: Sequence[StepCode | None]) -> list[Part]:
    """Map or compile the code of all steps."""
    parts = []
    code_bytes = limits.code_bytes
    for place, (step, code) in enumerate(zip(steps, codes, strict=True)):
        if code is None:
            kernel, text_bytes = _compiled(place, step, code_bytes)
            code_bytes -= text_bytes
        else:
            kernel = code.load()
        _check_scratch(place, kernel, limits)
        start = [value.repeat(rows, 0) for value in step.start]
        parts.append(Part(step.kind, step.graph, kernel, step.weights, start, step.shapes))
    return parts


def _compiled(place: int, step: _Step, code_bytes: int) -> tuple[KernelCalls, int]:
    """Compile a step; return its kernel and the bytes of its LLVM text."""
    from fusecell.compiler.runtime.kernel import compile_graph

    check_storage(step.graph)
    try:
        kernel = compile_graph(step.graph, about=f"{step.kind}, saved stream", code_bytes=code_bytes)
    except (AssertionError, LookupError, RecursionError) as error:
        # check_graph has passed, so the defect is the compiler's; a reader still has only one error to catch.
        name = type(error).__name__
        raise CompilerError(f"the compiler fails on its step {place}, please report it ({name}: {error})") from error
    return kernel, len(kernel.emitted.text)


def _check_scratch(place: int, kernel: KernelCalls, limits: Limits) -> None:
    """Raise CompilerError if a kernel needs more scratch memory for one row than the limit."""
    size = kernel.scratch.bytes(1, kernel.chunk(MOST_STEPS, 1))
    if size > limits.scratch_bytes:
        raise CompilerError(
            f"its step {place} takes {size:,} bytes of memory to run in, more than the {limits.scratch_bytes:,} "
            "that it may have"
        )
