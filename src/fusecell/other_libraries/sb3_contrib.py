"""sb3-contrib's recurrent policies: a sequence in which episodes begin is one call with resets, no loop over time."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fusecell.drop_in import LSTM
from fusecell.other_libraries.loops import Loop

__all__ = ["ActorCritic"]


class ActorCritic(Loop):
    """In the place of ``sb3_contrib.common.recurrent.policies.RecurrentActorCriticPolicy``, and of its subclasses."""

    overrides: ClassVar[tuple[str, ...]] = ("_process_sequence",)

    def _process_sequence(
        self, features: Tensor, lstm_states: tuple[Tensor, Tensor], episode_starts: Tensor, lstm: Any
    ) -> tuple[Tensor, Any]:
        rows = lstm_states[0].shape[1]
        draws = lstm.dropout and lstm.training and lstm.num_layers > 1
        if (
            not isinstance(lstm, LSTM) or draws or features.numel() == rows * lstm.input_size
        ):  # one step resets nothing inside
            result: tuple[Tensor, Any] = super()._process_sequence(features, lstm_states, episode_starts, lstm)  # type: ignore[misc]
            return result
        # Rows follow one another in what is passed, each with all of its steps.
        sequence = features.reshape(rows, -1, lstm.input_size).transpose(0, 1)
        begins = episode_starts.reshape(rows, -1).transpose(0, 1) != 0
        outputs, states = lstm(sequence, lstm_states, resets=begins)
        return outputs.transpose(0, 1).flatten(0, 1), states
