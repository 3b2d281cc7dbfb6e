"""Nests: values that are computed along axes, each by a function of its own with a loop over the rows of a step::

    @<stage>:  for row in rows:
                   the loops of the nest       `contraction`, `moves`, `reductions`

Operands and result are in memory. Loops over axes are loops of the text, so that its length doesn't depend on sizes.
"""

from __future__ import annotations

from fusecell.compiler.codegen.nests.rows_at import is_callers
from fusecell.compiler.codegen.nests.stage import emit_nest
from fusecell.compiler.codegen.nests.sums import SummedRows, emit_contract_sum, emit_scatter_sum

__all__ = ["SummedRows", "emit_contract_sum", "emit_nest", "emit_scatter_sum", "is_callers"]
