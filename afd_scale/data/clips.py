"""What a teacher gives and what becomes of it: clips of prompts, and what cannot be used of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from afd_scale.codecs.codec import VideoForm

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Clip:
    """One video of a prompt.

    Attributes:
        video: names it among the clips of its teacher: a file, or a position.
        prompt: what was asked.
        prompt_id: equal ids share a prompt.
        index: number of the video among those of its prompt.
        split: name of a group of prompts that its prompt is of; None where it is of none.
    """

    video: str
    prompt: str
    prompt_id: str
    index: int
    split: str | None = None

    @property
    def asked(self) -> tuple[str, int]:
        """Names it among all that its teacher is asked for."""
        return self.prompt_id, self.index


@dataclass(frozen=True)
class Reject:
    """A row of the prompts, or its video, that cannot be used; a line of `rejects.jsonl`."""

    video: str
    prompt: str
    reason: str


class Teacher(Protocol):
    """Where videos come from.

    Attributes:
        name: who made them.
        provenance: the settings that they follow from, JSON; no secrets.
        clips_at_once: after so many clips at the latest, finished work is safe from a kill; the many of here are for
            clips that cost little to make again.
    """

    name: str
    provenance: dict[str, Any]
    clips_at_once: int = 1 << 30

    def clips(self) -> Sequence[Clip | Reject]:
        """Every clip in its order; one that cannot be had is a Reject in its place.

        Raises:
            ConfigError: there is nothing to go through.
        """
        ...

    def fingerprint(self, clip: Clip) -> str:
        """Another one when the clip's video has changed; where there is no file, it follows from the settings."""
        return ""

    def frames(self, clip: Clip, form: VideoForm) -> Frames:
        """(T, H, W, C) of a clip in its form.

        Raises:
            RejectedError: the clip cannot be used.
        """
        ...
