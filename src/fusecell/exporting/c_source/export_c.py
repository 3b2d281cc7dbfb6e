"""``export_c``: write a stream as a file of C99, its header, and a test vector."""

from __future__ import annotations

from pathlib import Path

from fusecell.exporting.c_source.writer import SourceWriter
from fusecell.exporting.interface import interface_of, macs_of, sibling, write_headers, write_selftest
from fusecell.exporting.reference import reference_numbers
from fusecell.exporting.report import ExportReport
from fusecell.exporting.verify import NotRunnable, run_c
from fusecell.streaming.stream import Stream

__all__ = ["export_c"]

_NUMBERS = (
    "The bits of fusecell.Stream where fmaf and fma round once and the compiler contracts nothing: "
    "-ffp-contract=off, and no -ffast-math."
)
_COMPILERS = ("gcc", "clang")


def export_c(stream: Stream, stem: Path, prefix: str, *, verify: bool) -> ExportReport:
    """Write a stream as C99.

    Raises:
        ExportError: if a step has a primitive that C has no loop for, or a compiler's program differs.
        OSError: if a file can't be written.
    """
    writer = SourceWriter(stream, prefix)
    source = writer.source(f"{stem.name}.h", _NUMBERS)
    interface = interface_of(stream, prefix, writer.memory_bytes, _NUMBERS)
    stem.parent.mkdir(parents=True, exist_ok=True)
    path = sibling(stem, ".c")
    path.write_text(source)
    files, verified = [path, *write_headers(interface, stem)], "not asked for"
    if verify:
        numbers = reference_numbers(stream.parts, stream.batch_size, fused=True)
        if numbers is None:
            verified = "not run: this machine has no fused multiply-add"
        else:
            files.append(write_selftest(interface, numbers, stem))
            ran = []
            for compiler in _COMPILERS:
                try:
                    run_c(compiler, files, interface)
                    ran.append(compiler)
                except NotRunnable:
                    continue
            verified = (
                f"the stream's bits, compiled by {' and '.join(ran)}" if ran else "not run: no C compiler is installed"
            )
    return ExportReport(
        files=tuple(files),
        target="any machine",
        format="c",
        prefix=prefix,
        about=interface.about,
        code_bytes=None,
        weight_bytes=writer.weight_bytes,
        state_bytes=writer.state_bytes,
        scratch_bytes=writer.memory_bytes - writer.state_bytes,
        macs=macs_of(stream.parts, stream.batch_size),
        numbers=_NUMBERS,
        external=writer.external,
        verified=verified,
    )
