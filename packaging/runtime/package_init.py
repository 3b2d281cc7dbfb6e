"""Run streams that fusecell saved, one step at a time, without torch.

Example:
    >>> import fusecell_runtime as fc
    >>> stream = fc.load_stream("model.fusecell")  # doctest: +SKIP
    >>> y = stream.step(x)  # doctest: +SKIP
"""

from fusecell_runtime.errors import CompilerError, FusecellError
from fusecell_runtime.streaming.file import StreamFileError, load_stream
from fusecell_runtime.streaming.stream import Stream

__version__ = "<version>"

__all__ = ["CompilerError", "FusecellError", "Stream", "StreamFileError", "load_stream"]
