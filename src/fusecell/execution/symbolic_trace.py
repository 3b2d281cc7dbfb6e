"""torch.fx.symbolic_trace: cells and layers are leaves of its graphs, as torch.nn's modules are.

torch.fx takes for leaves the modules whose class is in the package ``torch.nn``, and calls all others with proxies,
which stand for tensors. A call with proxies is recorded here as torch.fx records that of a leaf.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch.fx
from torch import nn

__all__ = ["is_proxy", "record_call", "refuse_proxy"]


def is_proxy(value: object) -> bool:
    """Return whether torch.fx traces symbolically and passes this in a tensor's place."""
    return isinstance(value, torch.fx.Proxy)


def record_call(module: nn.Module, input: Any, state: Any, **data: Any) -> Any:
    """Record a call of a module in the graph that torch.fx traces, and return the proxy of its results.

    Arguments:
        input: a proxy.
        state, data: the further arguments; those that are None are left out.

    Raises:
        RuntimeError: if the module is the root of the trace, or no part of the model that is traced.
    """
    tracer, name = input.tracer, type(module).__name__
    if module is tracer.root:
        raise RuntimeError(
            f"torch.fx.symbolic_trace can't trace {name} itself: a recurrent layer is one node of a graph, as "
            "torch.nn's are. Trace a model that contains it, or use torch.export.export(model, ...)."
        )
    try:
        path = tracer.path_of_module(module)
    except NameError as error:
        raise RuntimeError(
            f"torch.fx.symbolic_trace can't record a call of {name}: {type(tracer.root).__name__}, which is traced, "
            "has no such submodule. Assign it to an attribute of the model."
        ) from error
    args = (input,) if state is None else (input, state)
    return tracer.create_proxy(
        "call_module", path, args, {key: value for key, value in data.items() if value is not None}
    )


def refuse_proxy(name: str) -> NoReturn:
    """Raise TypeError: a function that takes a cell was called while torch.fx traced."""
    raise TypeError(
        f"torch.fx.symbolic_trace can't record {name}, a function of a cell. Call the cell itself, or a "
        "fusecell.Recurrent around it, which are nodes of its graphs; or use torch.export.export(model, ...)."
    )
