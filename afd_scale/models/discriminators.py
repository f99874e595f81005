"""Prompt-paired scorers: a video and its prompt to one logit.

A Bradley-Terry loss sees differences of logits only, so nothing here shifts all logits alike: such a parameter would
have a gradient of rounding errors, which Adam turns into steps of full size.

Shape suffixes: B batch, F latent frames, C channels, H rows, W columns, T text rows, E width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from afd_scale.config.judges import ConvDiscriminatorConfig, LatentDiscriminatorConfig
from afd_scale.layers.attention import AttentionLayout
from afd_scale.layers.network import Network
from afd_scale.layers.ops import ModelOps
from afd_scale.models.wan import LayerNorm, WanTrunk, initialise
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
        rows = text_BTE.abs().sum(-1).gt(0).sum(1, keepdim=True).clamp(min=1)
        prompt = self.text((text_BTE.sum(1) / rows.sqrt()).to(x.dtype))
        for convolution, film in zip(self.convolutions, self.film, strict=True):
            scale, shift = film(prompt)[..., None, None].chunk(2, dim=1)
            x = F.leaky_relu(convolution(x) * (1 + scale) + shift, 0.2)
        return self.score(x.flatten(1)).squeeze(1).float()

    def _stack_frames(self, latents_BFCHW: Tensor) -> Tensor:
        """(B, video frames x colours, video rows, video columns): undo the identity codec."""
        x = latents_BFCHW.flatten(1, 2)  # channels are (latent frame, frame, row in patch, column in patch)
        return F.pixel_shuffle(x, self.pixels)


class LatentDiscriminator(WanTrunk):
    """A bidirectional Wan trunk over clean latents that cross-attends the prompt, and the mean score of its tokens."""

    def __init__(self, config: LatentDiscriminatorConfig, ops: ModelOps | None = None):
        super().__init__(config, ops or ModelOps())
        self.norm = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.score = nn.Linear(config.dim, 1, bias=False)
        self.apply(initialise)

    def starts_anew(self, parameter: str) -> bool:
        return parameter.startswith("score.")

    def forward(self, videos: Videos, *, adapter: str | None = None) -> Tensor:
        """(B,) logits."""
        latents_BFCHW, text_BTE = videos.latents, videos.prompts.embeddings
        frames = latents_BFCHW.shape[1]
        _, time_BF6E = self.embed_time(latents_BFCHW.new_zeros(latents_BFCHW.shape[:2]))
        layout = AttentionLayout.full(frames)
        rotation = self.rotation(latents_BFCHW, range(frames))
        x = self.run_blocks(latents_BFCHW, time_BF6E, self.embed_text(text_BTE), rotation, layout, adapter=adapter)
        rows, columns = self.token_grid(latents_BFCHW)
        # The score is linear: a token's number travels between ranks, and not its whole vector.
        scores = self.ops.gather_tokens(self.score(self.norm(x)), frames, rows * columns)
        return scores.float().mean(dim=(1, 2))
