"""``export``: write a stream as an object file, a library, C or a web page's module."""

from __future__ import annotations

import keyword
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from fusecell.exporting.header import Interface
from fusecell.exporting.interface import interface_of, macs_of, sibling, write_headers, write_selftest
from fusecell.exporting.library import build_library
from fusecell.exporting.object_file import read_object
from fusecell.exporting.program import build_program
from fusecell.exporting.reference import ReferenceNumbers, reference_numbers
from fusecell.exporting.report import ExportReport
from fusecell.exporting.targets import ExportTarget, target_named
from fusecell.exporting.verify import NotRunnable, run_object
from fusecell.streaming.stream import Stream

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Format", "export"]

Format = Literal["object", "static", "shared", "c", "web"]


def export(
    module: nn.Module | Stream,
    path: str | Path,
    target: str = "host",
    format: Format = "object",
    *,
    prefix: str | None = None,
    batch_size: int = 1,
    verify: bool = False,
    weights: str = "float32",
    keep: Collection[str] = (),
    input_sizes: Sequence[int | tuple[int, ...]] | None = None,
) -> ExportReport:
    """Write a layer's step for programs without Python: an object file, a library, C, or a web page's module.

    The files hold the weights, the initial state and the functions ``<prefix>_init``, ``_reset``, ``_step``, ``_push``,
    ``_get_state`` and ``_set_state``, which compute what :class:`fusecell.Stream` computes. Beside the artefact there
    are a C header and a C++ wrapper, ``.h`` and ``.hpp``. Several inputs or outputs are side by side in a row; the
    header says where each begins.

    Example:
        >>> import tempfile, pathlib, fusecell as fc
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> report = fc.export(fc.GRU(4, 16), folder / "gru", target="cortex-m7")
        >>> [path.name for path in report.files]
        ['gru.o', 'gru.h', 'gru.hpp']
        >>> report.weight_bytes
        4480

    Arguments:
        module: what :class:`fusecell.Stream` takes, in ``eval()`` mode if that matters, or a stream, loaded ones
            included. A stream's present state is not exported.
        path: the files' common path, without a suffix; with that of the artefact, it is left out.
        target: the machine, one of ``host`` and :data:`fusecell.exporting.TARGETS`.
        format: ``object``; ``static`` or ``shared``, libraries, for which the target's own tools must be installed;
            ``c``, a file of C99 for any machine; ``web``, a WebAssembly module with its JavaScript.
        prefix: of every symbol and constant; by default the file's name.
        batch_size: rows of a step, if ``module`` is no stream.
        verify: run the artefact, here or on an emulator that is installed, and compare it with the stream, bit by bit.
            A test vector is written too, ``<path>_selftest.c``.
        weights, keep, input_sizes: as :class:`fusecell.Stream` takes them; a stream keeps what it has.

    Returns:
        The :class:`fusecell.exporting.ExportReport`, whose text has sizes and what was verified.

    Raises:
        ValueError: for an unknown target or format, a prefix that is no name in C, a target without float64, or one
            without instructions for float16 weights.
        TypeError, NotCompilable: as :class:`fusecell.Stream` does.
        ExportError: if a tool that is needed is missing, or the artefact's numbers are not the stream's.
        OSError: if a file can't be written.
    """
    if format not in get_args(Format):
        raise ValueError(f"format is {format!r}; expected one of {', '.join(get_args(Format))}.")
    if target in get_args(Format):
        raise ValueError(f"target is {target!r}, and no machine but a format: pass it as format={target!r}.")
    machine = target_named("wasm32" if format == "web" else target)
    stream = _stream(module, batch_size, weights, keep, input_sizes)
    if stream.dtype.itemsize == 8 and not machine.doubles and format != "c":
        raise ValueError(
            f"{machine.summary} computes in float32 only, and the stream is float64: convert it by .float()."
        )
    halves = any(weight.format == "float16" for weight in stream.weights)
    if halves and not machine.machine.converts_half and format != "c":
        raise ValueError(
            f"{machine.summary} has no instruction that reads float16 weights: store them as bfloat16, which takes as "
            "much memory."
        )
    stem = _stem(Path(path))
    job = _Job(stream, stem, _prefix(prefix, stem), machine, verify)
    if format == "c":
        from fusecell.exporting.c_source import export_c

        return export_c(job.stream, job.stem, job.prefix, verify=verify)
    if format == "web":
        from fusecell.exporting.web import export_web

        return export_web(job.stream, job.stem, job.prefix, machine, verify=verify)
    return job.object(format)


def _stream(
    module: nn.Module | Stream,
    batch_size: int,
    weights: str,
    keep: Collection[str],
    input_sizes: Sequence[int | tuple[int, ...]] | None,
) -> Stream:
    """Return the stream to export."""
    if not isinstance(module, Stream):
        return Stream(module, batch_size, weights=weights, keep=keep, input_sizes=input_sizes)
    if input_sizes is not None:
        raise ValueError("input_sizes is for a module; a stream has its inputs.")
    if weights != "float32" or keep:
        raise ValueError(
            f"weights={weights!r} is for a module; a stream is exported with the weights that it has: make it "
            f"Stream(module, weights={weights!r})."
        )
    return module


def _stem(path: Path) -> Path:
    return (
        path.with_suffix("")
        if path.suffix in (".o", ".obj", ".a", ".lib", ".so", ".dll", ".dylib", ".c", ".wasm")
        else path
    )


def _prefix(prefix: str | None, stem: Path) -> str:
    """Return the prefix of symbols: the one that was passed, or one made of the file's name."""
    name = re.sub(r"\W", "_", stem.name, flags=re.ASCII).lower() if prefix is None else prefix
    if not re.fullmatch(r"[A-Za-z]\w*", name, flags=re.ASCII) or keyword.iskeyword(name):
        raise ValueError(
            f"The prefix of symbols is {name!r}; expected a letter, then letters, digits and underscores: pass "
            "prefix='...'."
        )
    return name


@dataclass(frozen=True)
class _Job:
    """An export to an object file or a library."""

    stream: Stream
    stem: Path
    prefix: str
    target: ExportTarget
    verify: bool

    def object(self, format: Format) -> ExportReport:
        stream, target = self.stream, self.target
        program = build_program(stream.parts, self.prefix, target)
        interface = interface_of(stream, self.prefix, program.memory.bytes, target.numbers)
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        artefact = sibling(self.stem, target.suffix)
        artefact.write_bytes(program.code)
        files = [artefact, *write_headers(interface, self.stem)]
        verified = "not asked for"
        if self.verify:
            numbers = reference_numbers(stream.parts, stream.batch_size, fused=target.machine.fma)
            verified, written = self._verified(program.code, interface, numbers, files)
            files += written
        if format != "object":
            files[0] = build_library(artefact, target, shared=format == "shared")
        found = read_object(program.code)
        return ExportReport(
            files=tuple(files),
            target=target.name,
            format=format,
            prefix=self.prefix,
            about=interface.about,
            code_bytes=found.loaded - program.memory.weights,
            weight_bytes=program.memory.weights,
            state_bytes=program.memory.state,
            scratch_bytes=program.memory.scratch,
            macs=macs_of(stream.parts, stream.batch_size),
            numbers=interface.numbers,
            external=found.undefined,
            verified=verified,
        )

    def _verified(
        self, code: bytes, interface: Interface, numbers: ReferenceNumbers | None, files: Sequence[Path]
    ) -> tuple[str, list[Path]]:
        """Run the artefact; return what to report, and the test vector's file."""
        if numbers is None:
            return "not run: this machine has no fused multiply-add, and so not the target's numbers", []
        vector = write_selftest(interface, numbers, self.stem)
        try:
            where = run_object(code, self.target, interface, numbers, [*files, vector])
        except NotRunnable as reason:
            return f"not run: {reason}; the selftest runs it on the target", [vector]
        return f"the stream's bits, run by {where}", [vector]
