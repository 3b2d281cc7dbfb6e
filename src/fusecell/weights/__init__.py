"""Weights from and for Keras, Flax, Equinox, Haiku and RTNeural."""

from fusecell.weights.convert import FORMATS, dump, load

__all__ = ["FORMATS", "dump", "load"]
