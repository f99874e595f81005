"""The words of the toy worlds' prompts: read off a sentence, said in other sentences, divided into seen and unseen."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np

from afd_scale.data.worlds.ball import FloatArray

Vocabulary = Sequence[Mapping[str, float]]  # of each attribute, its words


def attributes_of(sentence: str, vocabulary: Vocabulary, world: str, example: str) -> tuple[str, ...]:
    """The word of each attribute, in any order and among any others; upper and lower case are the same.

    Args:
        world, example: for errors, what the sentence is of and how one reads.
    Raises:
        ValueError: an attribute has no word there, or more than one.
    """
    words = sentence.lower().split()
    found = []
    for table in vocabulary:
        here = [word for word in words if word in table]
        if len(here) != 1:
            raise ValueError(f"prompt ({sentence!r}) must be a sentence of {world}, with one of {sorted(table)} in it, "
                             f"such as {example!r}: its teacher renders nothing else")  # fmt: skip
        found += here
    return tuple(found)


def check_words(prompt: Any, vocabulary: Vocabulary) -> None:
    """ValueError where a field of a prompt holds no word of its attribute."""
    for (name, word), table in zip(vars(prompt).items(), vocabulary, strict=True):
        if word not in table:
            raise ValueError(f"{name} ({word!r}) must be one of {sorted(table)}: the world has no other.")


def meanings(prompts: Sequence[Any], vocabulary: Vocabulary) -> list[FloatArray]:
    """Of each attribute, (N,) what the words of N prompts mean."""
    rows = [astuple(prompt) for prompt in prompts]
    return [np.array([table[row[at]] for row in rows], np.float64) for at, table in enumerate(vocabulary)]


def is_unseen(words: Sequence[str], vocabulary: Vocabulary) -> bool:
    """Whether a combination is of the quarter that `data.source.prompts: seen` leaves out.

    The places of the words in their tables decide: those before the last add up to an even number, and so do the last
    two. Every word, and every pair of words, is then in what is seen, and every word in what is not.
    """
    places = [list(table).index(word) for word, table in zip(words, vocabulary, strict=True)]
    return sum(places[:-1]) % 2 == 0 and sum(places[-2:]) % 2 == 0
