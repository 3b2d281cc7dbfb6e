"""Writing: one character at a time, the state carried."""

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
    """Let a model go on from a prompt.

    Arguments:
        count: characters to write.
        prompt: what comes before, at least one character.
        temperature: scores are divided by it; the lower, the safer the choice.
        seed: of the choices.

    Returns:
        The characters written, without the prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    scores, state = model(torch.from_numpy(vocabulary.encode(prompt))[:, None])
    written: list[int] = []
    for _ in range(count):
        last = scores[-1, 0] / temperature
        last[0] = -torch.inf  # the unknown character stands for many and can't be written
        choice = torch.multinomial(last.softmax(0), 1, generator=generator)
        written.append(int(choice))
        scores, state = model(choice[None], state)
    return vocabulary.decode(written)
