"""How each ATen operation is written in primitives of the IR: one function for each, in tables by kind.

`pointwise`, `reduction`, `products`, `convolution`, `movement` (views, slices) and `backward` (what autograd calls)
have a table each; an operation is added to one of them. `RULES` is all of those that compute something.
"""

from __future__ import annotations

from fusecell.compiler.frontend.rules.backward import BACKWARD
from fusecell.compiler.frontend.rules.convolution import CONVOLUTIONS
from fusecell.compiler.frontend.rules.pointwise import POINTWISE
from fusecell.compiler.frontend.rules.products import PRODUCTS
from fusecell.compiler.frontend.rules.reduction import REDUCTIONS

__all__ = ["RULES"]

RULES = {**POINTWISE, **REDUCTIONS, **PRODUCTS, **CONVOLUTIONS, **BACKWARD}
"""The function of each ATen operation, by its name."""
