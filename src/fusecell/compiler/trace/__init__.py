"""The tracer: a cell's step, and torch's gradient of it, as one graph.

``step`` is run on small tensors; a dispatch mode sees every ATen call of it and of autograd's backward.
"""

from fusecell.compiler.trace.tracing import Refusal, Traced, trace
from fusecell.compiler.trace.weights import Prologue

__all__ = ["Prologue", "Refusal", "Traced", "trace"]
