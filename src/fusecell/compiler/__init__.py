"""The compiler: a cell's step over a whole sequence as one machine-code loop."""

from fusecell.eager import run_eager
from fusecell.runner import register

register("auto", run_eager)
