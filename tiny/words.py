"""The tiny preset's text encoder: a fixed random vector for each word. It needs no weights and has a vector for every
word, but a model knows those alone that its captions had.
"""

import collections
import hashlib
import re
from pathlib import Path

import torch
from torch import Tensor

from runtime.options import UserError
from runtime.shards import Shards


class WordVectors:
    """A standard normal vector for each word, seeded by the word: the same on every machine and in every run."""

    dim = 32  # the tiny preset's text_dim
    max_len = 11  # its text_len of 24, less 13 slots for the task prompts of 13 latent frames

    def encode(self, captions: list[str]) -> list[Tensor]:
        """A list of states (S, dim), one for each word, at the caption's own length. Words past max_len are dropped."""
        vectors = [[self._word(w) for w in self.words(caption)[: self.max_len]] for caption in captions]
        return [torch.stack(v) if v else torch.zeros(0, self.dim) for v in vectors]

    @staticmethod
    def words(caption: str) -> list[str]:
        """The runs of letters and digits, in lower case."""
        return re.findall(r"\w+", caption.lower())

    def _word(self, word: str) -> Tensor:
        seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=7).digest(), "big")
        return torch.randn(self.dim, generator=torch.Generator().manual_seed(seed))


def unknown(prompts: list[str], data: str | Path) -> str:
    """A sentence if some words of the prompts are in no caption of `data`, a folder of prepare.py, or are past max_len.

    UserError for a prompt without any word that is known.
    """
    counts = collections.Counter()
    for row in Shards(data, "prepare.py or prepare.py --pairs", hashed=False).rows:
        counts.update(WordVectors.words(row["caption"]))
    common = sorted(word for word, _ in counts.most_common(40))
    known = f"its words are {', '.join(common)}{', …' if len(counts) > len(common) else ''}"
    strange, dropped = {}, {}  # dictionaries keep the order
    for prompt in prompts:
        read = WordVectors.words(prompt)
        dropped |= dict.fromkeys(read[WordVectors.max_len :])
        read = read[: WordVectors.max_len]
        strange |= dict.fromkeys(word for word in read if word not in counts)
        if not counts.keys() & {*read}:
            raise UserError(f"prompt {prompt[:80]!r}: expected words of the captions of {data}, got none; {known}")
    told = [f"no caption of {data} has {_few(strange)}; {known}"] if strange else []
    told += [f"of a prompt the first {WordVectors.max_len} words are read, not {_few(dropped)}"] if dropped else []
    return "; ".join(told)


def _few(found: dict[str, None]) -> str:
    return ", ".join(map(repr, [*found][:5])) + (", …" if len(found) > 5 else "")
