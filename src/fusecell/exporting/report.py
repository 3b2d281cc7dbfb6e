"""``ExportReport``: what was written, how large it is, and whether it was run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["ExportReport"]


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export has written.

    Attributes:
        files: their paths; the artefact first.
        target, format, prefix: as they were asked for.
        about: the stream, in a line.
        code_bytes: code and its constants, without weights; None for C, which a compiler has yet to turn into code.
        weight_bytes: packed weights and initial states, constant.
        state_bytes, scratch_bytes: the caller's memory of one stream. The stack comes on top.
        macs: multiply-adds of a step, all rows together.
        numbers: what the bits of its results are equal to, in a sentence.
        external: functions that it needs from elsewhere.
        verified: where it was run and found equal to the stream, bit by bit; or why it was not run.
    """

    files: tuple[Path, ...]
    target: str
    format: str
    prefix: str
    about: str
    code_bytes: int | None
    weight_bytes: int
    state_bytes: int
    scratch_bytes: int
    macs: int
    numbers: str
    external: tuple[str, ...]
    verified: str

    def __str__(self) -> str:
        code = "as its compiler makes it" if self.code_bytes is None else f"{self.code_bytes:,} bytes"
        lines = [
            f"{self.about}, as {self.format} for {self.target}",
            f"  files      {', '.join(str(path) for path in self.files)}",
            f"  code       {code}",
            f"  weights    {self.weight_bytes:,} bytes, constant",
            f"  state      {self.state_bytes:,} bytes of a stream's memory",
            f"  scratch    {self.scratch_bytes:,} bytes of a stream's memory",
            f"  work       {self.macs:,} multiply-adds a step",
            f"  needs      {', '.join(self.external) or 'nothing from elsewhere'}",
            f"  numbers    {self.numbers}",
            f"  verified   {self.verified}",
        ]
        return "\n".join(lines)
