"""The words of the toy worlds' prompts: read off a sentence, said in other sentences, divided into seen and unseen."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import ClassVar, Self

import numpy as np

from afd_scale.data.worlds.ball import FloatArray

Vocabulary = Sequence[Mapping[str, float]]  # of each attribute, its words


@dataclass(frozen=True)
class WorldPrompt:
    """One prompt of a toy world; every field of a subclass holds an attribute's word.

    Attributes:
        vocabulary: the words of each field, and what they mean. No word occurs twice.
        wording: the sentence, with the names of the fields in braces.
        world_name: how errors call it.
    """

    vocabulary: ClassVar[Vocabulary]
    wording: ClassVar[str]
    world_name: ClassVar[str]

    def __post_init__(self) -> None:
        for (name, word), table in zip(vars(self).items(), self.vocabulary, strict=True):
            if word not in table:
                raise ValueError(f"{name} ({word!r}) must be one of {sorted(table)}: the world has no other.")

    @property
    def sentence(self) -> str:
        """The prompt as the student reads it."""
        return self.wording.format(**vars(self))

    @property
    def prompt_id(self) -> str:
        """A stable name for files and tables."""
        return "-".join(astuple(self))

    @classmethod
    def every(cls) -> tuple[Self, ...]:
        """All prompts of the world, in a fixed order."""
        return tuple(cls(*words) for words in itertools.product(*cls.vocabulary))

    @classmethod
    def parse(cls, sentence: str) -> Self:
        """The prompt whose words are in a sentence, in any order and among any others, in upper case or lower.

        Raises:
            ValueError: an attribute has no word there, or more than one.
        """
        words, found = sentence.lower().split(), list[str]()
        for table in cls.vocabulary:
            here = [word for word in words if word in table]
            if len(here) != 1:
                raise ValueError(
                    f"prompt ({sentence!r}) must be a sentence of {cls.world_name}, with one of {sorted(table)} in it, "
                    f"such as {cls.every()[0].sentence!r}: its teacher renders nothing else"
                )
            found += here
        return cls(*found)


def meanings(prompts: Sequence[WorldPrompt], vocabulary: Vocabulary) -> list[FloatArray]:
    """Of each attribute, (N,) what the words of N prompts mean."""
    rows = [astuple(prompt) for prompt in prompts]
    return [np.array([table[row[at]] for row in rows], np.float64) for at, table in enumerate(vocabulary)]


def is_unseen(prompt: WorldPrompt) -> bool:
    """Whether a combination is of the quarter that `data.source.prompts: seen` leaves out.

    The places of the words in their tables decide: those before the last add up to an even number, and so do the last
    two. Every word, and every pair of words, is then in what is seen, and every word in what is not.
    """
    places = [list(table).index(word) for word, table in zip(astuple(prompt), prompt.vocabulary, strict=True)]
    return sum(places[:-1]) % 2 == 0 and sum(places[-2:]) % 2 == 0
