"""Register the drop-ins with Opacus, which looks layers up by their exact class: import this beside Opacus.

Opacus computes gradients per sample and so needs a layer written for that. With this import its ModuleValidator says
of a drop-in what it says of torch.nn's layer, and ``fix`` makes either its own DPRNN, DPGRU or DPLSTM.

Example:
    import fusecell.opacus_registry
    from opacus.validators import ModuleValidator

    model = ModuleValidator.fix(model)
"""

from __future__ import annotations

from opacus.validators import ModuleValidator
from torch import nn

from fusecell.drop_in import GRU, LSTM, RNN

__all__: list[str] = []

for drop_in, original in ((RNN, nn.RNN), (GRU, nn.GRU), (LSTM, nn.LSTM)):
    for registry in (ModuleValidator.VALIDATORS, ModuleValidator.FIXERS):
        if original in registry:
            registry[drop_in] = registry[original]
