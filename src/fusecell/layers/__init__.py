"""Layers: run cells over whole sequences."""

from fusecell.layers.recurrent import Bidirectional, Recurrent
from fusecell.layers.scan import scan
from fusecell.layers.sequential import Sequential, detach
from fusecell.layers.stack import Stack

__all__ = ["Bidirectional", "Recurrent", "Sequential", "Stack", "detach", "scan"]
