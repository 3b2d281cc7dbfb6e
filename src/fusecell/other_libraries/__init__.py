"""Layers of other libraries that loop over time in Python: subclasses of theirs that run the loop as a scan.

No library is imported here: a class is found by the name of the class that it is or inherits from. Each library has a
module of its name, with the methods that subclasses override; all else stays the library's. A method returns what the
library's own would, and calls that where it can't.
"""

from __future__ import annotations

import functools
import importlib
import types
from typing import Any

from torch import nn

__all__ = ["scanned_class"]

# The class that has the loop, and the mixin that takes the loop's place.
_LOOPS: dict[str, str] = {
    "ncps.torch.cfc.CfC": "ncps.Cfc",
    "ncps.torch.ltc.LTC": "ncps.Ltc",
    "sb3_contrib.common.recurrent.policies.RecurrentActorCriticPolicy": "sb3_contrib.ActorCritic",
    "speechbrain.nnet.RNN.LiGRU_Layer": "speechbrain.LightGru",
    "speechbrain.nnet.RNN.SLiGRU_Layer": "speechbrain.StableLightGru",
    "torchrecurrent.base.SingleStateRecurrentLayerBase": "torchrecurrent.OneState",
    "torchrecurrent.base.DecoupledSingleStateRecurrentLayerBase": "torchrecurrent.OneState",
    "torchrecurrent.base.DoubleStateRecurrentLayerBase": "torchrecurrent.TwoStates",
    "torchrecurrent.base.DecoupledDoubleStateRecurrentLayerBase": "torchrecurrent.TwoStates",
    "torchrl.modules.tensordict_module.rnn.GRUModule": "torchrl.GruModule",
    "torchrl.modules.tensordict_module.rnn.LSTMModule": "torchrl.LstmModule",
}


@functools.cache
def scanned_class(kind: Any) -> type[nn.Module] | str | None:
    """Return the class that takes the place of one with a loop over time; why there is none; None for any other."""
    if "takes_place_of" in vars(kind):
        return None
    base = next((each for each in kind.__mro__ if f"{each.__module__}.{each.__qualname__}" in _LOOPS), None)
    if base is None:
        return None
    module, _, name = _LOOPS[f"{base.__module__}.{base.__qualname__}"].rpartition(".")
    mixin: Any = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    for method in mixin.overrides:
        if not hasattr(base, method):
            return f"this version of {base.__module__.partition('.')[0]} has no {base.__name__}.{method}"
        if getattr(kind, method) is not getattr(base, method):
            return f"the {method} of {kind.__name__} is its own"

    def __reduce_ex__(self: Any, protocol: int) -> tuple[Any, ...]:  # no name finds this class
        _, _, state, *rest = kind.__reduce_ex__(self, max(protocol, 2))
        return _blank, (kind,), {**state, **mixin.added_attributes}, *rest

    names = {each: getattr(kind, each) for each in ("__module__", "__qualname__", "__doc__")}
    body = {**names, "takes_place_of": kind, "__reduce_ex__": __reduce_ex__}
    scanned: type[nn.Module] = types.new_class(
        kind.__name__, (mixin, kind), exec_body=lambda namespace: namespace.update(body)
    )
    return scanned


def _blank(kind: Any) -> nn.Module:
    """Return an object of the class that takes a library's class's place, for pickle to fill."""
    scanned: Any = scanned_class(kind)
    module: nn.Module = scanned.__new__(scanned)
    return module
