"""The demo's text: the modules of the standard library, split by file into a training and a held-out part."""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["Corpus", "Vocabulary", "held_out", "load_corpus"]

Ids = NDArray[np.int64]

_RARE = 50
"""A character that occurs less often than this in training counts as unknown, for every model."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The characters that a model distinguishes, with ids from 1; id 0 is any other character."""

    characters: str
    unknown = "\N{REPLACEMENT CHARACTER}"

    @classmethod
    def of(cls, text: str, rare: int = _RARE) -> Vocabulary:
        """Collect the characters that occur at least ``rare`` times in a text, in the order of their code points."""
        return cls("".join(sorted(char for char, count in Counter(text).items() if count >= rare)))

    def __len__(self) -> int:
        return len(self.characters) + 1

    def encode(self, text: str) -> Ids:
        """Return the ids of a text, int64 (len(text),)."""
        ids = {char: index for index, char in enumerate(self.characters, 1)}
        return np.fromiter((ids.get(char, 0) for char in text), np.int64, len(text))

    def decode(self, ids: Iterable[int]) -> str:
        return "".join((self.unknown + self.characters)[index] for index in ids)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Training and held-out text as ids, with the names of the files in each."""

    vocabulary: Vocabulary
    training: Ids
    held_out: Ids
    training_files: tuple[str, ...]
    held_out_files: tuple[str, ...]


def held_out(name: str) -> bool:
    """Return whether a file is held out: about one in ten, by its name alone, so the same on every machine."""
    # hash() differs from process to process; 26 of 256 is a tenth.
    return hashlib.sha256(name.encode()).digest()[0] < 26


def load_corpus(seed: int = 0, folder: Path | None = None) -> Corpus:
    """Read the top-level modules of the standard library and split them by file.

    Arguments:
        seed: of the order of the files.
        folder: a folder whose ``*.py`` to read instead.

    Raises:
        FileNotFoundError: if the folder holds too few modules for a training and a held-out part.
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    texts = {path.name: path.read_text(encoding="utf-8", errors="replace") for path in folder.glob("*.py")}
    names = sorted(name for name, text in texts.items() if text.strip())
    random.Random(seed).shuffle(names)
    training = tuple(name for name in names if not held_out(name))
    evaluation = tuple(name for name in names if held_out(name))
    if not training or not evaluation:
        raise FileNotFoundError(
            f"{folder} holds {len(names)} Python modules, {len(evaluation)} of them held out; the demo needs some of "
            "both. Some installations of Python leave out the library's sources: use one that has them."
        )
    text, rest = ("\n".join(texts[name] for name in part) for part in (training, evaluation))
    vocabulary = Vocabulary.of(text)
    return Corpus(vocabulary, vocabulary.encode(text), vocabulary.encode(rest), training, evaluation)
