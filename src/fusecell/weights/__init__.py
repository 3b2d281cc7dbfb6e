"""Weights from and for Keras, Flax, Equinox, Haiku, RTNeural and TensorFlow Lite."""

from fusecell.weights.convert import FORMATS, dump, load

__all__ = ["FORMATS", "dump", "load"]
