"""The demo's model: an embedding of characters, a stacked GRU and scores for the next character."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fusecell.demo.settings import Settings

__all__ = ["LAYERS", "CharacterModel", "build_model"]


def _fusecell_gru(input_size: int, hidden_size: int, num_layers: int) -> nn.GRU:
    # Imported here, so that a demo of torch's layer alone doesn't load the compiler.
    from fusecell.drop_in import GRU

    return GRU(input_size, hidden_size, num_layers)


def _torch_gru(input_size: int, hidden_size: int, num_layers: int) -> nn.GRU:
    return nn.GRU(input_size, hidden_size, num_layers)


LAYERS: dict[str, Callable[[int, int, int], nn.GRU]] = {"fusecell": _fusecell_gru, "torch": _torch_gru}
"""Constructors of the layers that the demo can train, called with (input_size, hidden_size, num_layers)."""


class CharacterModel(nn.Module):
    """A language model of characters: an embedding, a recurrent layer and a linear readout.

    Arguments:
        vocabulary_size: the number of ids.
        embedding_size: features of a character's embedding.
        layer: maps (T, N, embedding_size) and a state to (T, N, hidden_size) and a state.
    """

    def __init__(self, vocabulary_size: int, embedding_size: int, layer: nn.GRU) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.layer = layer
        self.readout = nn.Linear(layer.hidden_size, vocabulary_size)

    def forward(self, ids: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Score the next character at each step.

        Arguments:
            ids: int64 (T, N).
            state: the layer's, (num_layers, N, hidden_size); zeros if left out.

        Returns:
            The scores (logits), (T, N, vocabulary_size), and the state after the last step.
        """
        output, state = self.layer(self.embedding(ids), state)
        return self.readout(output), state


def build_model(settings: Settings, vocabulary_size: int) -> CharacterModel:
    """Build the model for some settings; equal seeds give equal weights, whichever the layer."""
    if settings.layer not in LAYERS:
        raise ValueError(f"the demo's layer is one of {', '.join(sorted(LAYERS))}; got {settings.layer!r}.")
    # The drop-in draws its weights in torch.nn's order, so a seed gives both layers the same.
    torch.manual_seed(settings.seed)
    layer = LAYERS[settings.layer](settings.embedding_size, settings.hidden_size, settings.num_layers)
    return CharacterModel(vocabulary_size, settings.embedding_size, layer)
