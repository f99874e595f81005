"""The toy world's codec: grey frames folded into channels without loss, a hash of each word for its embedding."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from afd_scale.config import ConfigError
from afd_scale.data.clips import Frames, RejectedError, VideoForm
from afd_scale.data.codec import SpaceTimeToDepth, to_uint8, to_unit
from afd_scale.data.text import embed_words

TEXT_SHAPE = (16, 32)


class IdentityCodec:
    """Latents by `SpaceTimeToDepth`, text by `embed_words`.

    Attributes:
        name, colour, text_shape: as of any `Codec`.
        fold: the frames and pixels of one latent position.
    """

    colour: Literal["gray", "rgb24"] = "gray"

    def __init__(self, fold: SpaceTimeToDepth, text_shape: tuple[int, int] = TEXT_SHAPE) -> None:
        self.fold = fold
        self.name = fold.name
        self.text_shape = text_shape
        self.provenance: dict[str, Any] = {"name": fold.name}

    @classmethod
    def of_form(cls, form: VideoForm, text_shape: tuple[int, int] = TEXT_SHAPE) -> IdentityCodec:
        """The codec that folds the most of a form, up to the toy world's own patch; there is one for every form."""
        largest = SpaceTimeToDepth()
        fold = SpaceTimeToDepth(
            frames=_largest_divisor(largest.frames, form.frames),
            pixels=_largest_divisor(largest.pixels, form.height, form.width),
        )
        return cls(fold, text_shape)

    def latent_shape(self, form: VideoForm) -> tuple[int, int, int, int]:
        """(F, C, H, W) of a video's latents.

        Raises:
            ConfigError: the form is not grey, or its sizes do not divide.
        """
        if form.colour != self.colour:
            raise ConfigError(f"colour ({form.colour}) must be {self.colour}: {self.name} folds one channel")
        for name, patch in (("frames", self.fold.frames), ("height", self.fold.pixels), ("width", self.fold.pixels)):
            size = getattr(form, name)
            if size % patch:
                raise ConfigError(f"{name} ({size}) must be divisible by {patch}: {self.name} folds whole patches")
        pixels = self.fold.pixels
        return form.frames // self.fold.frames, self.fold.channels, form.height // pixels, form.width // pixels

    def encode(self, frames: Frames) -> NDArray[np.float16]:
        """(T, H, W, 1) frames to (F, C, H, W) latents."""
        # A copy: arrays over a decoder's or a shard's bytes are read-only, and torch does not share those.
        video = to_unit(torch.tensor(frames[..., 0]))
        latents: NDArray[np.float16] = self.fold.encode(video[None])[0].to(torch.float16).numpy()
        return latents

    def decode(self, latents: NDArray[np.float16]) -> Frames:
        """(F, C, H, W) latents to (T, H, W, 1) frames, the exact inverse of `encode`."""
        video = self.fold.decode(torch.tensor(latents).to(torch.float32)[None])[0]
        frames: Frames = to_uint8(video)[..., None].numpy()
        return frames

    def embed(self, prompt: str) -> NDArray[np.float16]:
        """(n, E) embedding of a prompt of n words.

        Raises:
            RejectedError: the prompt has more than T words.
        """
        max_words, dim = self.text_shape
        num_words = len(prompt.split())
        if num_words > max_words:
            raise RejectedError(f"prompt must have at most {max_words} words: it has {num_words}")
        return embed_words(prompt, max_words=num_words, dim=dim)


def _largest_divisor(limit: int, *sizes: int) -> int:
    return next(n for n in range(limit, 0, -1) if all(size % n == 0 for size in sizes))
