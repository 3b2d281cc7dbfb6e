"""What happens inside: ``record`` and its ``Tape``, numbers, plots and a page."""

from fusecell.tape.recording import record
from fusecell.tape.tape import Tape

__all__ = ["Tape", "record"]
