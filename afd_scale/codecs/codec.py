"""What a codec is: pixels to latents and back, prompts to embeddings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from afd_scale.config import ConfigError

# (B, f, C', H', W'), the next latent frames of B videos, to their pixels (B, t, C, H, W).
ChunkDecoder = Callable[[Tensor], Tensor]


class RejectedError(ValueError):
    """This clip cannot be used; the others can. The reason, in one line."""


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


class Codec(Protocol):
    """Turns pixels into latents and prompts into embeddings; tensors come from any device and are given on its own.

    Attributes:
        name: of the latents it makes, in the dataset's facts.
        spatial: pixels along a latent's side.
        whole_frame_pixels: of the largest frame that is decoded chunk by chunk.
        colour: of the frames it takes.
        text_shape: (T, E) of an embedding with its padding.
        provenance: what the latents and embeddings follow from, JSON.
    """

    name: str
    spatial: int
    whole_frame_pixels: int
    provenance: dict[str, Any]
    colour: Literal["gray", "rgb24"]
    text_shape: tuple[int, int]

    def latent_shape(self, form: VideoForm) -> tuple[int, int, int, int]:
        """(F, C', H', W') of a video's latents.

        Raises:
            ConfigError: videos of this form cannot be encoded.
        """
        ...

    def frames(self, latent_frames: int) -> int:
        """Frames of a video of so many latent frames."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, T, C, H, W) pixels in [-1, 1] to (B, F, C', H', W') float32 latents.

        Raises:
            ConfigError: videos of this size cannot be encoded.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """(B, F, C', H', W') latents to (B, T, C, H, W) float32 pixels in [-1, 1]."""
        ...

    def decoder(self) -> ChunkDecoder:
        """A decoder of videos from their start, chunk by chunk: all chunks together give what `decode` gives.

        It remembers what it has seen, and nothing of other decoders.
        """
        ...

    def rest(self) -> None:
        """Leave the device until something is encoded or decoded again."""
        ...

    def embed(self, prompt: str) -> NDArray[np.float16]:
        """(n, E) embedding of a prompt without its padding, n at most T.

        Raises:
            RejectedError: the prompt cannot be embedded.
        """
        ...
