"""The former name of :mod:`fusecell.torch_operator`, which exported programs may still import."""

import fusecell.compiler.dispatch.torch_operator  # noqa: F401  # registers the operator

__all__: list[str] = []
