"""Wrappers: each takes any cell and is a cell itself, so that wrappers nest, stack, stream and compile."""

from fusecell.wrappers.base import Wrapper
from fusecell.wrappers.composition import LearnedState, Projected, Residual, WithReadout
from fusecell.wrappers.regularisation import RecurrentDropout, VariationalDropout, WeightDrop, Zoneout

__all__ = [
    "LearnedState",
    "Projected",
    "RecurrentDropout",
    "Residual",
    "VariationalDropout",
    "WeightDrop",
    "WithReadout",
    "Wrapper",
    "Zoneout",
]
