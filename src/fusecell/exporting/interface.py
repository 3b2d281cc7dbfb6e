"""What every form of artefact has: the description of its functions, its headers and its test vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fusecell.exporting.header import Field, Interface, c_header, cpp_wrapper
from fusecell.exporting.reference import ReferenceNumbers, selftest_source
from fusecell.streaming.bound_step import Part
from fusecell.streaming.row_layout import RowLayout, feature_ranges, is_one_shape, shape_list
from fusecell.streaming.stream import Stream

__all__ = ["interface_of", "macs_of", "sibling", "write_headers", "write_selftest"]


def sibling(stem: Path, suffix: str) -> Path:
    """Return the path with a suffix behind it, whatever points its name has."""
    return stem.with_name(stem.name + suffix)


def interface_of(stream: Stream, prefix: str, memory_bytes: int, numbers: str) -> Interface:
    """Describe a stream to its callers."""
    kinds = ", ".join(part.kind for part in stream.parts)
    return Interface(
        prefix=prefix,
        scalar="float" if stream.dtype.itemsize == 4 else "double",
        rows=stream.batch_size,
        inputs=_fields(stream.parts[0].row_shapes.input, list(stream.parts[0].input_ranges)),
        outputs=_fields(stream.parts[-1].row_shapes.output, ["output"]),
        state_size=sum(value.size for value in stream.state),
        memory_bytes=memory_bytes,
        about=f"{prefix}: {kinds}, {stream.input_size} -> {stream.output_size}, {stream.dtype}",
        numbers=numbers,
    )


def _fields(layout: RowLayout, names: Sequence[str]) -> tuple[Field, ...]:
    """List the tensors of a row: under the names of a dict, else those that are given, numbered if there are more."""
    shapes = shape_list(layout)
    if isinstance(layout, Mapping):
        names = list(layout)
    elif not is_one_shape(layout) and len(names) != len(shapes):
        names = [f"{names[0]}_{place}" for place in range(len(shapes))]
    spans = feature_ranges(layout)
    return tuple(Field(*each) for each in zip(names, spans, shapes, strict=True))


def write_headers(interface: Interface, stem: Path) -> list[Path]:
    """Write the C header and the C++ wrapper."""
    header, wrapper = sibling(stem, ".h"), sibling(stem, ".hpp")
    header.write_text(c_header(interface))
    wrapper.write_text(cpp_wrapper(interface, header.name))
    return [header, wrapper]


def write_selftest(interface: Interface, numbers: ReferenceNumbers, stem: Path) -> Path:
    """Write the test vector."""
    path = sibling(stem, "_selftest.c")
    path.write_text(selftest_source(interface, numbers, stem.name + ".h"))
    return path


def macs_of(parts: Sequence[Part], rows: int) -> int:
    """Count the multiply-adds of a step."""
    return sum(part.kernel.macs for part in parts) * rows
