"""The toy world's codec: grey pixels laid out as channels without loss, a hash of each word for its embedding."""

from __future__ import annotations

import hashlib
import sys
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afd_scale.codecs.codec import ChunkDecoder, RejectedError, VideoForm
from afd_scale.config import ConfigError

NAME = "identity"
TEXT_SHAPE = (16, 32)
FRAMES, PIXELS = 3, 4


class IdentityCodec:
    """A patch of `frames` x `pixels` x `pixels` becomes the channels of one latent position.

    A channel is (frame, row, column) within its patch, the column fastest.

    Attributes:
        name, spatial, whole_frame_pixels, colour, text_shape, provenance: as of any `Codec`.
    """

    colour: Literal["gray", "rgb24"] = "gray"
    whole_frame_pixels = sys.maxsize

    def __init__(
        self, frames: int = FRAMES, pixels: int = PIXELS, *, text_shape: tuple[int, int] = TEXT_SHAPE,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self._frames, self.spatial = frames, pixels
        self._channels = frames * pixels**2
        self._device = torch.device(device)
        self.name = f"{NAME}:{frames}x{pixels}x{pixels}"
        self.text_shape = text_shape
        self.provenance: dict[str, Any] = {"name": self.name}

    @classmethod
    def of_form(cls, form: VideoForm, text_shape: tuple[int, int] = TEXT_SHAPE) -> IdentityCodec:
        """The codec of the largest patch that fits a form, up to the toy world's own; there is one for every form."""
        frames = _largest_divisor(FRAMES, form.frames)
        return cls(frames, _largest_divisor(PIXELS, form.height, form.width), text_shape=text_shape)

    def latent_shape(self, form: VideoForm) -> tuple[int, int, int, int]:
        """(F, C, H, W) of a video's latents.

        Raises:
            ConfigError: the form is not grey, or its sizes do not divide.
        """
        if form.colour != self.colour:
            raise ConfigError(f"colour ({form.colour}) must be {self.colour}: {self.name} takes one channel")
        return self._latent_shape(form.frames, form.height, form.width)

    def frames(self, latent_frames: int) -> int:
        """Frames of a video of so many latent frames."""
        return latent_frames * self._frames

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, T, 1, H, W) pixels to (B, F, C, H', W') latents.

        Raises:
            ConfigError: they are not grey, or T, H or W does not divide.
        """
        if pixels.ndim != 5 or pixels.shape[2] != 1:
            raise ConfigError(f"pixels.shape {tuple(pixels.shape)} must be (B, T, 1, H, W): {self.name} takes grey")
        self._latent_shape(pixels.shape[1], *pixels.shape[3:])
        video, side = pixels.to(self._device, torch.float32).squeeze(2), (-1, self.spatial)
        patches = video.unflatten(3, side).unflatten(2, side).unflatten(1, (-1, self._frames))
        return patches.permute(0, 1, 2, 4, 6, 3, 5).flatten(2, 4)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, F, C, H', W') latents to (B, T, 1, H, W) pixels, the exact inverse of `encode`.

        Raises:
            ConfigError: the channels are not this codec's.
        """
        if latents.ndim != 5 or latents.shape[2] != self._channels:
            raise ConfigError(f"latents.shape {tuple(latents.shape)} must be (B, F, {self._channels}, H, W): "
                              f"a channel is one pixel of {self.name}")  # fmt: skip
        patch = (self._frames, self.spatial, self.spatial)
        patches = latents.to(self._device, torch.float32).unflatten(2, patch)
        return patches.permute(0, 1, 2, 5, 3, 6, 4).flatten(5, 6).flatten(3, 4).flatten(1, 2).unsqueeze(2)

    def decoder(self) -> ChunkDecoder:
        """No patch needs another one."""
        return self.decode

    def rest(self) -> None:
        """It holds nothing there."""

    def embed(self, prompt: str) -> NDArray[np.float16]:
        """(n, E) embedding of a prompt of n words, upper and lower case the same.

        It has the layout of UMT5's, but a word has one vector whatever its neighbours. The entries are +1 and -1 (unit
        variance, different words nearly orthogonal), read from a hash, so they are the same on every machine and in
        every version of numpy.

        Raises:
            RejectedError: the prompt has more than T words.
        """
        max_words, dim = self.text_shape
        words = prompt.lower().split()
        if len(words) > max_words:
            raise RejectedError(f"prompt must have at most {max_words} words: it has {len(words)}")
        embedding = np.zeros((len(words), dim), dtype=np.float16)
        for row, word in enumerate(words):
            digest = hashlib.shake_256(word.encode()).digest((dim + 7) // 8)
            embedding[row] = 2.0 * np.unpackbits(np.frombuffer(digest, dtype=np.uint8), count=dim) - 1.0
        return embedding

    def _latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        for name, size, patch in (
            ("frames", frames, self._frames), ("height", height, self.spatial), ("width", width, self.spatial),
        ):  # fmt: skip
            if size % patch:
                raise ConfigError(f"{name} ({size}) must be divisible by {patch}: {self.name} takes whole patches")
        return frames // self._frames, self._channels, height // self.spatial, width // self.spatial


def _largest_divisor(limit: int, *sizes: int) -> int:
    return next(n for n in range(limit, 0, -1) if all(size % n == 0 for size in sizes))
