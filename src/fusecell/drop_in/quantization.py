"""torch.ao.quantization looks its modules up by their exact class: it gets torch.nn's classes in place of the drop-ins.

It has no registry for that, so one function of its module is wrapped, the one that all of its workflows begin with:
``propagate_qconfig_``, which gives each module the settings that the caller's table has for its class. A drop-in to
which it gives some becomes torch.nn's layer, for good, which the workflow then converts; all others stay as they are.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import nn

__all__ = ["register_drop_ins"]


def register_drop_ins() -> None:
    """Wrap ``propagate_qconfig_``, unless it is wrapped already, or a later torch has none any more."""
    try:
        # By name: the package has a function of the name of its module.
        quantize: Any = importlib.import_module("torch.ao.quantization.quantize")
        propagate = quantize.propagate_qconfig_
    except (ImportError, AttributeError):
        return
    if not hasattr(propagate, "__wrapped__"):
        quantize.propagate_qconfig_ = _with_torchs_classes(propagate)


def _with_torchs_classes(propagate: Any) -> Any:
    """Wrap a function of a model so that it sees torch.nn's classes; drop-ins that it gives a ``qconfig`` keep them."""

    @functools.wraps(propagate)
    def propagate_qconfig_(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        from fusecell.drop_in.class_swap import become, original_class  # which nothing else needs

        parts: list[Any] = list(module.modules())
        drop_ins = [part for part in parts if original_class(type(part)) is not None and part.is_torchs()]
        before = [(part, type(part), dict(vars(part))) for part in drop_ins]
        for part in drop_ins:
            original: Any = original_class(type(part))
            become(part, original)
        try:
            propagate(module, *args, **kwargs)
        finally:
            for part, kind, attributes in before:
                if getattr(part, "qconfig", None) is None:
                    become(part, kind)
                    vars(part).update({name: attributes[name] for name in part.added_attributes if name in attributes})

    return propagate_qconfig_
