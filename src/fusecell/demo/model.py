"""The model: characters in, a stacked GRU, the next character's scores out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fusecell.demo.settings import Settings

__all__ = ["LAYERS", "CharacterModel", "build_model"]


def _fusecell_gru(input_size: int, hidden_size: int, num_layers: int) -> nn.GRU:
    from fusecell.drop_in import GRU

    return GRU(input_size, hidden_size, num_layers)


def _torch_gru(input_size: int, hidden_size: int, num_layers: int) -> nn.GRU:
    return nn.GRU(input_size, hidden_size, num_layers)


LAYERS: dict[str, Callable[[int, int, int], nn.GRU]] = {"fusecell": _fusecell_gru, "torch": _torch_gru}
"""The recurrent layers the demo can train: ``(input_size, hidden_size, num_layers)`` to a layer."""


class CharacterModel(nn.Module):
    """An embedding, a recurrent layer and a linear readout.

    Arguments:
        vocabulary_size: how many characters there are.
        embedding_size: features of a character.
        layer: maps (T, N, embedding_size) and a state to (T, N, its hidden_size) and a state.
    """

    def __init__(self, vocabulary_size: int, embedding_size: int, layer: nn.GRU) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.layer = layer
        self.readout = nn.Linear(layer.hidden_size, vocabulary_size)

    def forward(self, ids: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scores of the next character after each, (T, N, vocabulary_size), for ids (T, N), and the state."""
        output, state = self.layer(self.embedding(ids), state)
        return self.readout(output), state


def build_model(settings: Settings, vocabulary_size: int) -> CharacterModel:
    """The model of some settings; equal seeds give equal weights, whatever the layer."""
    if settings.layer not in LAYERS:
        raise ValueError(f"the demo's layer is one of {', '.join(sorted(LAYERS))}; got {settings.layer!r}.")
    torch.manual_seed(settings.seed)
    layer = LAYERS[settings.layer](settings.embedding_size, settings.hidden_size, settings.num_layers)
    return CharacterModel(vocabulary_size, settings.embedding_size, layer)
