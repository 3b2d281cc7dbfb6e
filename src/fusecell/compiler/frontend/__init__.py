"""The tracer: a cell's step, and torch's gradient of it, as one graph.

``step`` is run on small tensors; a dispatch mode sees every ATen call of it and of autograd's backward.
"""

from fusecell.compiler.frontend.tracer import Traced, attributes, input_names, trace
from fusecell.compiler.frontend.weight_prologue import Prologue

__all__ = ["Prologue", "Traced", "attributes", "input_names", "trace"]
