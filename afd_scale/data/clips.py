"""What a teacher gives and what becomes of it: clips of prompts, the form that all are brought into, codecs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from afd_scale.config import ConfigError

Frames = NDArray[np.uint8]


class RejectedError(ValueError):
    """This clip cannot be used; the others can. The reason, in one line."""


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


@dataclass(frozen=True)
class Reject:
    """A row of the prompts, or its video, that cannot be used; a line of `rejects.jsonl`."""

    video: str
    prompt: str
    reason: str


@dataclass(frozen=True)
class VideoForm:
    """What every video is brought to before it is encoded.

    Attributes:
        frames: from the start of the video.
        fps: frames a second.
        height, width: pixels.
        aspect: how another aspect ratio is met: cut the middle out, add black bars, or stretch.
        colour: channels of a frame, 1 or 3.
    """

    frames: int
    fps: float
    height: int
    width: int
    aspect: Literal["crop", "pad", "stretch"] = "crop"
    colour: Literal["gray", "rgb24"] = "rgb24"

    def __post_init__(self) -> None:
        for name in ("frames", "fps", "height", "width"):
            value = getattr(self, name)
            if not 0 < value < 1e6:
                raise ConfigError(f"{name} ({value}) must be positive: it is of the videos that are written")


class Teacher(Protocol):
    """Where videos come from.

    Attributes:
        name: who made them.
        provenance: the settings that they follow from, JSON; no secrets.
        clips_at_once: after so many clips at the latest, finished work is safe from a kill.
    """

    name: str
    provenance: dict[str, Any]
    clips_at_once: int

    def clips(self) -> Sequence[Clip | Reject]:
        """Every clip in its order; one that cannot be had is a Reject in its place.

        Raises:
            ConfigError: there is nothing to go through.
        """
        ...

    def fingerprint(self, clip: Clip) -> str:
        """Another one when the clip's video has changed."""
        ...

    def frames(self, clip: Clip, form: VideoForm) -> Frames:
        """(T, H, W, C) of a clip in its form.

        Raises:
            RejectedError: the clip cannot be used.
        """
        ...


class Codec(Protocol):
    """Turns frames into latents and prompts into embeddings.

    Attributes:
        name: of the latents it makes, in the dataset's facts.
        colour: of the frames it takes.
        text_shape: (T, E) of an embedding with its padding.
        provenance: what the latents and embeddings follow from, JSON.
    """

    name: str
    provenance: dict[str, Any]
    colour: Literal["gray", "rgb24"]
    text_shape: tuple[int, int]

    def latent_shape(self, form: VideoForm) -> tuple[int, int, int, int]:
        """(F, C, H, W) of a video's latents.

        Raises:
            ConfigError: videos of this form cannot be encoded.
        """
        ...

    def encode(self, frames: Frames) -> NDArray[np.float16]:
        """(T, H, W, C) frames to (F, C, H, W) latents.

        Raises:
            RejectedError: float16 cannot hold them.
        """
        ...

    def decode(self, latents: NDArray[np.float16]) -> Frames:
        """(F, C, H, W) latents to (T, H, W, C) frames."""
        ...

    def embed(self, prompt: str) -> NDArray[np.float16]:
        """(n, E) embedding of a prompt without its padding, n at most T.

        Raises:
            RejectedError: the prompt cannot be embedded.
        """
        ...
