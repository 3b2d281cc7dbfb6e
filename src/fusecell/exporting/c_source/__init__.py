"""A stream as one file of C99 that any compiler takes: the user's names, plain loops, the bits of the stream."""

from fusecell.exporting.c_source.export_c import export_c

__all__ = ["export_c"]
