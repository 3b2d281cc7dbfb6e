"""Record the intermediate values of cells (``record``) and read, plot and save them (``Tape``)."""

from fusecell.tape.recording import record
from fusecell.tape.tape import Tape

__all__ = ["Tape", "record"]
