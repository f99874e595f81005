"""Prompt-paired scorers: a video and its prompt to one logit.

A Bradley-Terry loss sees differences of logits only, so nothing here shifts all logits alike: such a parameter would
have a gradient of rounding errors, which Adam turns into steps of full size.

Shape suffixes: B batch, F latent frames, C channels, H rows, W columns, T text rows, E width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd_scale.config.judges import ConvDiscriminatorConfig, LatentDiscriminatorConfig
from afd_scale.layers.attention import AttentionLayout
from afd_scale.layers.network import Network
from afd_scale.layers.ops import ModelOps
from afd_scale.models.wan import WanTrunk, initialise
from afd_scale.types import Videos


class ConvDiscriminator(Network):
    """Three convolutions over a video's stacked frames, each modulated by the prompt (FiLM).

    Args:
        latent_frames, latent_channels, latent_size: F, C and (H, W) of the latents.
        text_dim: width of a text embedding row.
    """

    def __init__(
        self, config: ConvDiscriminatorConfig, latent_frames: int, latent_channels: int, latent_size: tuple[int, int],
        text_dim: int,
    ):  # fmt: skip
        super().__init__()
        _, self.pixels = config.identity_patch
        width = config.channels
        images = latent_frames * latent_channels // self.pixels**2
        convolutions = [
            nn.Conv2d(images, width, 4, stride=2, padding=1),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        ]
        self.convolutions = nn.ModuleList(convolutions)
        self.film = nn.ModuleList(nn.Linear(2 * width, 2 * c.out_channels) for c in convolutions)
        self.text = nn.Sequential(nn.Linear(text_dim, 2 * width), nn.SiLU())
        positions = (latent_size[0] * self.pixels // 4) * (latent_size[1] * self.pixels // 4)  # after two strides of 2
        self.score = nn.Linear(2 * width * positions, 1, bias=False)

    def forward(self, videos: Videos) -> Tensor:
        """(B,) logits; text rows of zeros (padding) do not count."""
        latents_BFCHW, text_BTE = videos.latents, videos.prompts.embeddings
        x = self._stack_frames(latents_BFCHW.to(self.score.weight.dtype))
        prompt = self.text(pooled_text(text_BTE).to(x.dtype))
        for convolution, film in zip(self.convolutions, self.film, strict=True):
            x = modulated(convolution(x), film(prompt))
        return self.score(x.flatten(1)).squeeze(1).float()

    def _stack_frames(self, latents_BFCHW: Tensor) -> Tensor:
        """(B, video frames x colours, video rows, video columns): undo the identity codec."""
        x = latents_BFCHW.flatten(1, 2)  # channels are (latent frame, frame, row in patch, column in patch)
        return F.pixel_shuffle(x, self.pixels)


class LatentDiscriminator(WanTrunk):
    """A bidirectional Wan trunk over clean latents that cross-attends the prompt, and the mean score of its tokens; or
    frozen features of some of its layers, and a head."""

    config: LatentDiscriminatorConfig

    def __init__(self, config: LatentDiscriminatorConfig, ops: ModelOps | None = None):
        super().__init__(config, ops or ModelOps())
        del self.blocks[config.layers_run :]
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        if config.features:
            self.head = FeatureHead(len(config.features), config.dim, config.head_channels, config.text_dim)
        else:
            self.score = nn.Linear(config.dim, 1, bias=False)
        self.apply(initialise)

    def starts_anew(self, parameter: str) -> bool:
        return parameter.startswith(("score.", "head."))

    def forward(self, videos: Videos, *, adapter: str | None = None) -> Tensor:
        """(B,) logits."""
        latents_BFCHW = videos.latents
        frames, (rows, columns) = latents_BFCHW.shape[1], self.token_grid(latents_BFCHW)
        if not self.config.features:
            # The score is linear: a token's number travels between ranks, and not its whole vector.
            scores = self.score(self.norm(self._run_trunk(videos, adapter)))
            return self.ops.gather_tokens(scores, frames, rows * columns).float().mean(dim=(1, 2))
        features = dict.fromkeys(self.config.features, latents_BFCHW)  # to be replaced
        with torch.set_grad_enabled(latents_BFCHW.requires_grad):  # whoever asks for it may have it by the latents
            self._run_trunk(videos, adapter, features)
            normed = [self.norm(features[layer]) for layer in self.config.features]
        joined = self.ops.gather_tokens(self.head.join(normed), frames, rows * columns)
        return self.head(joined.unflatten(1, (frames, rows, columns)), videos.prompts.embeddings)

    def _run_trunk(self, videos: Videos, adapter: str | None, outputs: dict[int, Tensor] | None = None) -> Tensor:
        """(B, L, E) of this rank's tokens.

        Args:
            outputs: see `run_blocks`.
        """
        latents_BFCHW, frames = videos.latents, videos.latents.shape[1]
        _, time_BF6E = self.embed_time(latents_BFCHW.new_zeros(latents_BFCHW.shape[:2]))
        text = self.embed_text(videos.prompts.embeddings)
        rotation, layout = self.rotation(latents_BFCHW, range(frames)), AttentionLayout.full(frames)
        return self.run_blocks(
            latents_BFCHW, time_BF6E, text, rotation, layout, adapter=adapter, outputs=outputs
        )  # fmt: skip


class FeatureHead(nn.Module):
    """Two convolutions over the features of a video's tokens, modulated by the prompt (FiLM), and their mean score."""

    def __init__(self, num_layers: int, dim: int, channels: int, text_dim: int):
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(dim, channels, bias=False) for _ in range(num_layers))
        wide = 2 * channels
        self.convolutions = nn.ModuleList(
            [nn.Conv3d(channels, wide, 3, stride=(1, 2, 2), padding=1), nn.Conv3d(wide, wide, 3, padding=1)]
        )
        self.film = nn.ModuleList(nn.Linear(wide, 2 * wide) for _ in self.convolutions)
        self.text = nn.Sequential(nn.Linear(text_dim, wide), nn.SiLU())
        self.score = nn.Linear(wide, 1, bias=False)

    def join(self, features: Sequence[Tensor]) -> Tensor:
        """(B, L, channels) of this rank's tokens."""
        parts = [project(x_BLE) for project, x_BLE in zip(self.projections, features, strict=True)]
        return torch.stack(parts).sum(0)

    def forward(self, joined_BFHWE: Tensor, text_BTE: Tensor) -> Tensor:
        """(B,) logits."""
        x, prompt = joined_BFHWE.movedim(-1, 1), self.text(pooled_text(text_BTE).to(joined_BFHWE.dtype))
        for convolution, film in zip(self.convolutions, self.film, strict=True):
            x = modulated(convolution(x), film(prompt))
        return self.score(x.mean(dim=(2, 3, 4))).squeeze(1).float()


def modulated(x: Tensor, film: Tensor) -> Tensor:
    """FiLM, and what is not linear: x (B, C, ...) by a scale and a shift of each channel, which are (B, 2 C)."""
    scale, shift = film.reshape(*film.shape, *[1] * (x.ndim - 2)).chunk(2, dim=1)
    return F.leaky_relu(x * (1 + scale) + shift, 0.2)


def pooled_text(text_BTE: Tensor) -> Tensor:
    """(B, E) of unit variance where the rows have it; rows of zeros (padding) do not count."""
    rows = text_BTE.abs().sum(-1).gt(0).sum(1, keepdim=True).clamp(min=1)
    return text_BTE.sum(1) / rows.sqrt()
