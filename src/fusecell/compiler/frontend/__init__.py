"""The tracer: a cell's step, and torch's gradient of it, as one graph.

``step`` is run on small tensors; a dispatch mode sees every ATen call of it and of autograd's backward.
"""

from fusecell.compiler.frontend.traced_step import Traced, attributes, input_names
from fusecell.compiler.frontend.tracer import trace
from fusecell.compiler.frontend.weight_prologue import Prologue

__all__ = ["Prologue", "Traced", "attributes", "input_names", "trace"]
