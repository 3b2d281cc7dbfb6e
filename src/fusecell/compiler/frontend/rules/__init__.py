"""How each ATen operation is written in primitives of the IR: one function for each, in tables by kind.

Each module here has a table; `backward` has what autograd calls, and `movement` the names of views and joins, which
need no rule. An operation is added to one of them. `RULES` is all of those that compute something.
"""

from __future__ import annotations

from fusecell.compiler.frontend.rules.backward import BACKWARD
from fusecell.compiler.frontend.rules.convolution import CONVOLUTIONS
from fusecell.compiler.frontend.rules.indexing import INDEXING
from fusecell.compiler.frontend.rules.interpolation import INTERPOLATIONS
from fusecell.compiler.frontend.rules.losses import LOSSES
from fusecell.compiler.frontend.rules.norms import NORMS
from fusecell.compiler.frontend.rules.padding import PADDINGS
from fusecell.compiler.frontend.rules.pointwise import POINTWISE
from fusecell.compiler.frontend.rules.pooling import POOLING
from fusecell.compiler.frontend.rules.products import PRODUCTS
from fusecell.compiler.frontend.rules.reduction import REDUCTIONS
from fusecell.compiler.frontend.rules.sampling_grid import SAMPLING_GRIDS
from fusecell.compiler.frontend.rules.scans import SCANS
from fusecell.compiler.frontend.rules.searching import SEARCHES
from fusecell.compiler.frontend.rules.small_matrices import SMALL_MATRICES
from fusecell.compiler.frontend.rules.sorting import SORTING
from fusecell.compiler.frontend.rules.special import SPECIAL, SPECIAL_BACKWARD

__all__ = ["ELEMENTWISE", "OVER_FEATURES", "RULES"]

RULES = {
    **POINTWISE,
    **SPECIAL,
    **REDUCTIONS,
    **SCANS,
    **NORMS,
    **PRODUCTS,
    **CONVOLUTIONS,
    **POOLING,
    **INTERPOLATIONS,
    **INDEXING,
    **SORTING,
    **SEARCHES,
    **LOSSES,
    **PADDINGS,
    **SAMPLING_GRIDS,
    **SMALL_MATRICES,
    **BACKWARD,
    **SPECIAL_BACKWARD,
}
"""The function of each ATen operation, by its name."""
_BACKWARD_OVER_FEATURES = {"_softmax_backward_data", "_log_softmax_backward_data", "native_layer_norm_backward"}
ELEMENTWISE = frozenset({*POINTWISE, *SPECIAL, *BACKWARD, *SPECIAL_BACKWARD}) - _BACKWARD_OVER_FEATURES
"""The operations that compute each element of their result from one element of each argument."""
OVER_FEATURES = frozenset({*REDUCTIONS, *SCANS, *NORMS, *_BACKWARD_OVER_FEATURES})
"""The operations that sum, compare or normalise features."""
