"""From captions to text states. One interface for every encoder:

    encode(captions) -> list of (S, text_dim) float32, one state a token, at each caption's true length

`WordVectors` is the tiny preset's: a fixed random vector for each word, so it knows every word and needs no weights.
"""

import hashlib
import re

import torch
from torch import Tensor


class WordVectors:
    """A standard normal vector for each word, drawn from the word itself: the same on every machine and in
    every run.
    """

    dim = 32  # the tiny preset's text_dim
    max_len = 11  # its text_len of 24, less 13 slots for the task prompts of 13 latent frames

    def encode(self, captions: list[str]) -> list[Tensor]:
        """Words are runs of letters and digits, in lower case; those past max_len are dropped. No words: (0, dim)."""
        vectors = [[self._word(w) for w in self.words(caption)[: self.max_len]] for caption in captions]
        return [torch.stack(v) if v else torch.zeros(0, self.dim) for v in vectors]

    @staticmethod
    def words(caption: str) -> list[str]:
        return re.findall(r"\w+", caption.lower())

    def _word(self, word: str) -> Tensor:
        seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=7).digest(), "big")
        return torch.randn(self.dim, generator=torch.Generator().manual_seed(seed))
