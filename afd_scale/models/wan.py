"""Causal Wan: the Wan 2.1 transformer with block-causal, teacher-forcing and KV-cached passes. Plain torch.

Reading order: `WanTrunk` embeds latents, time and text and runs the blocks; `CausalWan` adds the head and is the
student; wan_block.py has one layer. Parameter names are those of original Wan and Self-Forcing checkpoints.

Three passes, one set of weights (`CausalWan.forward`):
    block-causal      forward(noisy, timestep, text)                chunk i sees chunks <= i (one chunk: original Wan)
    teacher forcing   forward(noisy, timestep, text, clean=clean)   chunk i sees clean chunks < i and itself; with
                                                                    first_frame a window of a longer video
    cached            forward(chunk, timestep, text, cache=cache)   one chunk sees the cached ones and itself, or two do

Shape suffixes: B batch, F latent frames, C channels, H rows, W columns, L tokens, E width, N heads, D head width,
T text rows.

Sources: Wan, arXiv:2503.20314; Self-Forcing, arXiv:2506.08009.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd_scale.config.models import WanConfig
from afd_scale.config.sampler import SamplerConfig
from afd_scale.layers.attention.layout import NO_GAP, AttentionLayout
from afd_scale.layers.kv_cache import CleanPast, KVCache, Past
from afd_scale.layers.network import Network
from afd_scale.layers.ops import ModelOps
from afd_scale.layers.rope import Rotation, WindowRotation
from afd_scale.models.wan_block import Block, add_time, apart, modulate, side_by_side

X0_SIGMA_FLOOR = 1e-3  # an x0-predicting network's velocity is (x_sigma - x0) / max(sigma, floor)


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its kernel, computed as one matrix product."""

    def __init__(self, channels: int, width: int, patch: Sequence[int]):
        super().__init__()
        self.patch = tuple(patch)
        self.weight = nn.Parameter(torch.empty(width, channels, *patch))
        self.bias = nn.Parameter(torch.zeros(width))

    def patches(self, x_BFCHW: Tensor) -> Tensor:
        """(B, L, C p q) values of each token's patch."""
        _, p, q = self.patch
        x = x_BFCHW.unflatten(4, (-1, q)).unflatten(3, (-1, p))  # (B, F, C, H/p, p, W/q, q)
        return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)

    def forward(self, patches_BLX: Tensor) -> Tensor:
        return F.linear(patches_BLX, self.weight.flatten(1), self.bias)


class OutputLinear(nn.Linear):
    """Starts at zero, so that an untrained student predicts nothing."""


class Head(nn.Module):
    """Modulated norm and projection to a patch of latents."""

    def __init__(self, config: WanConfig):
        super().__init__()
        _, p, q = config.patch
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = OutputLinear(config.dim, p * q * config.latent_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x_BLE: Tensor, time_BFE: Tensor) -> Tensor:
        shift, scale = apart(add_time(self.modulation, time_BFE[:, :, None]))
        return self.head(modulate(self.norm(x_BLE), shift, scale))


class WanTrunk(Network):
    """Everything up to the head."""

    def __init__(self, config: WanConfig, ops: ModelOps):
        super().__init__()
        self.config, self.ops = config, ops
        dim = config.dim
        self.patch_embedding = PatchEmbedding(config.latent_channels, dim, config.patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config, each) for each in ops.of_blocks(config.num_layers))
        self.modulations: Tensor | None = None  # see `fuse`
        self.register_load_state_dict_pre_hook(WanTrunk._come_apart)
        self._rotations = lru_cache(maxsize=64)(Rotation)  # a rollout turns by the same angles in each of its steps

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def units(self) -> list[nn.Module]:
        return list(self.blocks)

    def embed_text(self, text_BTE: Tensor) -> Tensor:
        """(B, text_length, E): zero rows to text_length *before* the text MLP, as Wan does; all are attended."""
        rows = self.config.text_length - text_BTE.shape[1]
        if rows < 0:
            raise ValueError(f"text rows ({text_BTE.shape[1]}) must be at most text_length ({self.config.text_length})")
        return self.text_embedding(F.pad(text_BTE.to(self.dtype), (0, 0, 0, rows)))

    def embed_time(self, timestep_BF: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F, E) time embedding and (B, F, 6, E) modulation of the blocks."""
        half = self.config.freq_dim // 2
        exponent = -torch.arange(half, dtype=torch.float64, device=timestep_BF.device) / half
        angle = timestep_BF.double()[..., None] * 10000.0**exponent
        time_BFE = self.time_embedding(torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.dtype))
        return time_BFE, self.time_projection(time_BFE).unflatten(-1, (6, -1))

    def rotation(self, latents_BFCHW: Tensor, *frames: range, repeats: int = 1) -> Rotation:
        """RoPE for latents whose frames stand at these positions, `repeats` times one after the other."""
        rows, columns = self.token_grid(latents_BFCHW)
        head_dim = self.config.dim // self.config.num_heads
        rotation: Rotation = self._rotations(frames, repeats, rows, columns, head_dim, latents_BFCHW.device)
        return rotation

    def cached_rotation(self, latents_BFCHW: Tensor, cache: KVCache) -> Rotation | WindowRotation:
        """RoPE of a pass with a cache, which has begun it."""
        own, seen = cache.positions()
        rotation = self.rotation(latents_BFCHW, *own)
        return rotation if seen is None else WindowRotation(rotation, self.rotation(latents_BFCHW, *seen))

    def fuse(self) -> None:
        for block in self._blocks:
            block.fuse()
        self.modulations = side_by_side([block.modulation for block in self._blocks])

    def _come_apart(self, *_: Any) -> None:
        """Parameters are about to be others."""
        for block in self._blocks:
            block.self_attn.fused = None
        self.modulations = None

    def _apply(self, function: Any, recurse: bool = True) -> Any:
        if recurse:
            self._come_apart()
        return super()._apply(function, recurse)

    @property
    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def _times(self, time_BF6E: Tensor) -> tuple[Sequence[Tensor], bool]:
        """Each block's time, and whether its modulation is added: one sum for all blocks of a fused network."""
        if self.modulations is None or torch.is_grad_enabled():
            return [time_BF6E] * len(self.blocks), False
        return add_time(self.modulations[:, None, None], time_BF6E).unbind(), True

    def run_blocks(
        self, latents_BFCHW: Tensor, time_BF6E: Tensor, text_BTE: Tensor | None, rotation: Rotation | WindowRotation,
        layout: AttentionLayout, *, pasts: Sequence[Past] | None = None, collected: list[CleanPast] | None = None,
        adapter: str | None = None, outputs: dict[int, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Patch embedding and all blocks.

        Args:
            pasts: what each layer sees besides these latents.
            collected: gains each layer's keys and values.
            outputs: gets the outputs of the layers that it has, the first is 1.
        Returns:
            (B, L, E): this rank's tokens.
        """
        patches = self.patch_embedding.patches(latents_BFCHW.to(self.dtype))
        x = self.patch_embedding(self.ops.split_tokens(patches, latents_BFCHW.shape[1]))
        if torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()  # under frozen weights too every unit has an input with gradient
        times, are_added = self._times(time_BF6E)
        for index, (block, time) in enumerate(zip(self.blocks, times, strict=True)):
            past = None if pasts is None else pasts[index]
            x, k, v = self.ops.run_block(
                block, x, time, are_added, text_BTE, rotation, layout, past, adapter,
                recompute=self.config.activation_checkpointing,
            )  # fmt: skip
            if collected is not None:
                collected.append(CleanPast(k, v))
            if outputs is not None and index + 1 in outputs:
                outputs[index + 1] = x
        return x

    def token_grid(self, latents_BFCHW: Tensor) -> tuple[int, int]:
        """Rows and columns of tokens in a frame."""
        _, p, q = self.config.patch
        return latents_BFCHW.shape[3] // p, latents_BFCHW.shape[4] // q


class CausalWan(WanTrunk):
    """The student: from noisy latents to velocities."""

    def __init__(self, config: WanConfig, sampler: SamplerConfig, ops: ModelOps | None = None):
        """Args:
            sampler: whose chunks, window and sink say which frames see which.
        """  # fmt: skip
        super().__init__(config, ops or ModelOps())
        self.sampler = sampler
        self.head = Head(config)
        self.apply(initialise)

    def forward(
        self, noisy: Tensor, timestep: Tensor, text: Tensor,
        *, clean: Tensor | None = None, first_frame: int = 0, clean_gradient: bool = True,
        cache: KVCache | None = None, adapter: str | None = None,
    ) -> Tensor:  # fmt: skip
        """Velocity of noisy latents.

        Args:
            noisy: (B, F, C, H, W) latents; a chunk with `cache`.
            timestep: (B, F) in [0, 1000], equal inside a chunk.
            text: (B, T, text_dim) embeddings, T <= text_length. With `clean`, of its B / S rows.
            clean: (B / S, F, C, H, W) clean latents that the chunks are conditioned on (teacher forcing). Each row
                serves the S noised states that stand side by side in `noisy`, at the price of one pass. Where `noisy`
                is a window of a longer video there are more of them, F + f: before the window's own those that its
                chunks see, the sink and then the newest f - sink of the frames before it, or all of these.
            first_frame: of the window, in the video.
            clean_gradient: let gradients flow through the clean pass.
            cache: of a rollout; `noisy` is its current chunk, or that and the next. It keeps the first pass's text
                until it is told to forget it.
            adapter: of `ops.adapters`; None is the base itself.
        Returns:
            (B, F, C, H, W) velocity noise - x0, in the dtype of `noisy`.
        Raises:
            ValueError: the times are not one of each frame, which some shapes would only broadcast.
        """
        frames = noisy.shape[1]
        if timestep.shape != noisy.shape[:2]:
            raise ValueError(
                f"timestep {tuple(timestep.shape)} must be (B, F) {tuple(noisy.shape[:2])}, as the latents"
            )
        if cache is not None:
            layout = cache.begin_pass(frames)
            rotation = cache.rotation or self.cached_rotation(noisy, cache)
            unread = None if cache.has_text else text
            prediction = self._predict(noisy, timestep, unread, rotation, layout, adapter, cache.layers)
        elif clean is not None:
            window = _Window(first_frame, noisy.shape[1], clean.shape[1], self.sampler)
            prediction = self._predict_teacher_forcing(noisy, timestep, text, clean, window, clean_gradient, adapter)
        else:
            layout = AttentionLayout.block_causal(frames, *self.sampler.layout)
            prediction = self._predict(noisy, timestep, text, self.rotation(noisy, range(frames)), layout, adapter)
        prediction = prediction.to(noisy.dtype)
        return prediction if self.config.prediction == "velocity" else velocity_from_x0(noisy, prediction, timestep)

    def new_cache(self, frames: int | None) -> KVCache:
        """An empty cache for a rollout of so many latent frames, or without an end."""
        return KVCache(self.config.num_layers, frames, *self.sampler.layout, self.sampler.positions == "window")

    def _predict(
        self, latents: Tensor, timestep: Tensor, text: Tensor | None, rotation: Rotation | WindowRotation,
        layout: AttentionLayout, adapter: str | None, pasts: Sequence[Past] | None = None,
    ) -> Tensor:  # fmt: skip
        """What the network outputs, (B, F, C, H, W): velocity or x0; no text where the pasts have it."""
        frames, (rows, columns) = latents.shape[1], self.token_grid(latents)
        time_BFE, time_BF6E = self.embed_time(timestep)
        text = None if text is None else self.embed_text(text)
        x = self.run_blocks(latents, time_BF6E, text, rotation, layout, pasts=pasts, adapter=adapter)
        patches = self.ops.gather_tokens(self.head(x, time_BFE), frames, rows * columns)
        return self._unpatchify(patches, frames, rows, columns)

    def _predict_teacher_forcing(
        self, noisy: Tensor, timestep: Tensor, text: Tensor, clean: Tensor, window: "_Window", clean_gradient: bool,
        adapter: str | None,
    ) -> Tensor:  # fmt: skip
        """The states of a row stand one after the other along the frames, so that they share its text and clean past.

        With gradient the clean frames run along in the same pass: ZeRO-3 meets each module once. Without, a pass of
        their own leaves keys and values, and no activations.
        """
        (rows, frames), count = clean.shape[:2], noisy.shape[1]
        states = noisy.shape[0] // rows
        latents, times = noisy.unflatten(0, (rows, states)).flatten(1, 2), timestep.reshape(rows, states * count)
        clean_times = times.new_zeros(rows, frames)
        place = (states, window.first, window.gap)
        if clean_gradient and torch.is_grad_enabled():
            layout = AttentionLayout.clean_and_noisy(window.end, *self.sampler.layout, *place)
            latents, times = torch.cat([clean.to(latents), latents], dim=1), torch.cat([clean_times, times], dim=1)
            rotation = self.rotation(clean, *window.clean_frames, *[window.frames] * states)
            prediction = self._predict(latents, times, text, rotation, layout, adapter)[:, frames:]
        else:
            layout = AttentionLayout.teacher_forcing(window.end, *self.sampler.layout, *place)
            pasts = self._encode_clean(clean, clean_times, text, window, adapter)
            rotation = self.rotation(clean, window.frames, repeats=states)
            prediction = self._predict(latents, times, text, rotation, layout, adapter, pasts)
        return prediction.unflatten(1, (states, count)).flatten(0, 1)

    @torch.no_grad()
    def _encode_clean(
        self, clean: Tensor, timestep: Tensor, text: Tensor, window: "_Window", adapter: str | None
    ) -> list[CleanPast]:
        """Each layer's keys and values of clean latents."""
        layout = AttentionLayout.block_causal(window.end, *self.sampler.layout, gap=window.gap)
        _, time_BF6E = self.embed_time(timestep)
        pasts: list[CleanPast] = []
        rotation = self.rotation(clean, *window.clean_frames)
        text = self.embed_text(text)
        self.run_blocks(clean, time_BF6E, text, rotation, layout, collected=pasts, adapter=adapter)
        return pasts

    def _unpatchify(self, x_BLE: Tensor, frames: int, rows: int, columns: int) -> Tensor:
        """(B, L, p q C) -> (B, F, C, H, W)."""
        _, p, q = self.config.patch
        x = x_BLE.unflatten(2, (p, q, -1)).unflatten(1, (frames, rows, columns))  # (B, F, h, w, p, q, C)
        return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


class _Window:
    """Which frames of a video are noised, and which clean ones are there.

    Attributes:
        first, end: of those that are noised.
        gap: frames before them that are not there.
        frames, clean_frames: positions of both, counted as in a rollout: from the video's beginning, or from the first
            frame that is there.
    """

    def __init__(self, first: int, noisy: int, clean: int, sampler: SamplerConfig):
        sink, missing = sampler.sink_frames, first + noisy - clean
        assert missing == 0 or 0 < missing <= first - sink, "the clean frames are the sink, and the newest"
        self.first, self.end = first, first + noisy
        self.gap = (sink, sink + missing) if missing else NO_GAP
        stands = self.gap if sampler.positions == "absolute" else NO_GAP  # what the positions leave out
        end = clean + stands[1] - stands[0]
        self.frames = range(end - noisy, end)
        self.clean_frames = tuple(run for run in (range(stands[0]), range(stands[1], end)) if run)


def velocity_from_x0(noisy: Tensor, x0: Tensor, timestep: Tensor) -> Tensor:
    """(x_sigma - x0) / max(sigma, floor)."""
    sigma = (timestep / 1000).clamp(min=X0_SIGMA_FLOOR).to(noisy.dtype)
    return (noisy - x0) / sigma[..., None, None, None]


def initialise(module: nn.Module) -> None:
    """Xavier for linears and patches, zero for the output; for `Module.apply`, which also works under zero.Init."""
    if isinstance(module, OutputLinear):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, PatchEmbedding):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        nn.init.zeros_(module.bias)
