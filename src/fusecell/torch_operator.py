"""Register the operator ``fusecell::scan``: import this where an exported program is loaded.

A program of torch.export or torch.compile calls the operator by its name, so the process that runs it needs this
import and none of the classes that it was exported from.

Example:
    >>> import torch, fusecell as fc
    >>> program = torch.export.export(fc.GRU(4, 5), (torch.randn(3, 2, 4),))
    >>> import fusecell.torch_operator  # all that a process which loads it imports
    >>> program.module()(torch.randn(3, 2, 4))[0].shape
    torch.Size([3, 2, 5])
"""

import fusecell.compiler.dispatch.torch_compile  # noqa: F401  # registers the operator

__all__: list[str] = []
