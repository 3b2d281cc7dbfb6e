"""ONNX: any layer as a model of standard operators, and the recurrent nodes of a model as trainable layers.

Needs the package ``onnx``: ``pip install 'fusecell[convert]'``.
"""

from __future__ import annotations

try:
    import onnx as _onnx  # noqa: F401
except ImportError as error:
    raise ImportError("fusecell.onnx needs the package onnx: pip install 'fusecell[convert]'.") from error

from fusecell.onnx.export import export
from fusecell.onnx.load import load

__all__ = ["export", "load"]
