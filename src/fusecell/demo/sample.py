"""Sample text from a model, one character at a time."""

from __future__ import annotations

import torch

from fusecell.demo.corpus import Vocabulary
from fusecell.demo.model import CharacterModel

__all__ = ["write"]


@torch.no_grad()
def write(
    model: CharacterModel,
    vocabulary: Vocabulary,
    count: int,
    *,
    prompt: str = "\n\nclass ",
    temperature: float = 0.6,
    seed: int = 0,
) -> str:
    """Let a model continue a prompt.

    Arguments:
        model: the model.
        vocabulary: the characters of its ids.
        count: the number of characters to write.
        prompt: the text before, at least one character.
        temperature: the scores are divided by it; the lower, the likelier the probable characters.
        seed: of the random choices.

    Returns:
        The new characters, without the prompt.
    """
    # A generator of its own, so that a sample neither depends on nor changes torch's global one.
    generator = torch.Generator().manual_seed(seed)
    scores, state = model(torch.from_numpy(vocabulary.encode(prompt))[:, None])
    written: list[int] = []
    for _ in range(count):
        last = scores[-1, 0] / temperature
        last[0] = -torch.inf  # id 0 is any unknown character, which can't be written
        choice = torch.multinomial(last.softmax(0), 1, generator=generator)
        written.append(int(choice))
        scores, state = model(choice[None], state)
    return vocabulary.decode(written)
