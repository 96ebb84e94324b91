"""The tiny preset's text encoder: a fixed random vector for each word. It knows every word and needs no weights."""

import hashlib
import re

import torch
from torch import Tensor


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
