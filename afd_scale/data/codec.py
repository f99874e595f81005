"""The toy world's codec: it stands where a video VAE stands in a real run, and loses nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NAME = "space_time_to_depth"


@dataclass(frozen=True)
class SpaceTimeToDepth:
    """Fold `frames` x `pixels` x `pixels` of a grey video into the channels of one latent position.

    A channel is (frame, row, column) within its patch, the column fastest.
    """

    frames: int = 3
    pixels: int = 4

    @property
    def name(self) -> str:
        """What a dataset's facts call it."""
        return f"{NAME}:{self.frames}x{self.pixels}x{self.pixels}"

    @property
    def channels(self) -> int:
        """Latent channels."""
        return self.frames * self.pixels**2

    def encode(self, video: Tensor) -> Tensor:
        """Video to latents.

        Args:
            video: (B, T, H, W) in [-1, 1].
        Returns:
            (B, T / frames, channels, H / pixels, W / pixels).
        Raises:
            ValueError: T, H or W does not divide.
        """
        if video.ndim != 4:
            raise ValueError(f"video.shape {tuple(video.shape)} must be (B, T, H, W): the codec takes grey clips.")
        batch, num_frames, height, width = video.shape
        for name, size, patch in (
            ("frames", num_frames, self.frames),
            ("height", height, self.pixels),
            ("width", width, self.pixels),
        ):
            if size % patch:
                raise ValueError(f"video {name} ({size}) must be divisible by {patch}: a patch is folded whole.")
        latent_frames, rows, columns = num_frames // self.frames, height // self.pixels, width // self.pixels
        patches = video.reshape(batch, latent_frames, self.frames, rows, self.pixels, columns, self.pixels)
        patches = patches.permute(0, 1, 2, 4, 6, 3, 5)
        return patches.reshape(batch, latent_frames, self.channels, rows, columns)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to video, the exact inverse of `encode`.

        Args:
            latents: (B, F, channels, h, w).
        Returns:
            (B, F * frames, h * pixels, w * pixels).
        Raises:
            ValueError: the channels are not this codec's.
        """
        if latents.ndim != 5 or latents.shape[2] != self.channels:
            raise ValueError(
                f"latents.shape {tuple(latents.shape)} must be (B, F, {self.channels}, H, W): "
                f"a channel is one of {self.frames} x {self.pixels} x {self.pixels} pixels."
            )
        batch, latent_frames, _, rows, columns = latents.shape
        patches = latents.reshape(batch, latent_frames, self.frames, self.pixels, self.pixels, rows, columns)
        patches = patches.permute(0, 1, 2, 5, 3, 6, 4)
        return patches.reshape(batch, latent_frames * self.frames, rows * self.pixels, columns * self.pixels)


def to_unit(frames: Tensor) -> Tensor:
    """uint8 frames in [0, 255] to float32 in [-1, 1], the same shape."""
    return frames.to(torch.float32) / 127.5 - 1.0


def to_uint8(video: Tensor) -> Tensor:
    """Video in [-1, 1] to uint8 frames of the same shape, clamped and rounded."""
    return ((video.to(torch.float32) + 1.0) * 127.5).round().clamp(0.0, 255.0).to(torch.uint8)
