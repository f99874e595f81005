"""Word vectors for the toy world: they stand where UMT5 embeddings stand in a real run."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def embed_words(sentence: str, *, max_words: int, dim: int) -> NDArray[np.float16]:
    """Embed each word of a sentence by a hash of its letters.

    It stands where UMT5 stands in a real run: the same layout and zero padding, but a word has one vector
    whatever its neighbours. The entries are +1 and -1 (unit variance, different words nearly orthogonal),
    read from a hash, so they are the same on every machine and in every version of numpy.

    Args:
        sentence: words separated by blanks; upper and lower case are the same.
        max_words: rows of the result.
        dim: length of a word's vector.
    Returns:
        (max_words, dim); the rows past the sentence are zero.
    Raises:
        ValueError: the sentence has more than `max_words` words.
    """
    words = sentence.lower().split()
    if len(words) > max_words:
        raise ValueError(
            f"max_words ({max_words}) must be at least {len(words)}: {sentence!r} would lose its last words."
        )
    embedding = np.zeros((max_words, dim), dtype=np.float16)
    for row, word in enumerate(words):
        digest = hashlib.shake_256(word.encode()).digest((dim + 7) // 8)
        bits = np.unpackbits(np.frombuffer(digest, dtype=np.uint8), count=dim)
        embedding[row] = 2.0 * bits - 1.0
    return embedding
