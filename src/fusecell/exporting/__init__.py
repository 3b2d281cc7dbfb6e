"""Trained cells in programs without Python: object files, C, web pages, microcontrollers."""

from fusecell.exporting.artefact import export
from fusecell.exporting.report import ExportReport
from fusecell.exporting.targets import TARGETS, ExportTarget

__all__ = ["TARGETS", "ExportReport", "ExportTarget", "export"]
