"""Former name of :mod:`fusecell.torch_operator`, kept for scripts that load exported programs."""

import fusecell.compiler.dispatch.torch_compile  # noqa: F401  # registers the operator

__all__: list[str] = []
