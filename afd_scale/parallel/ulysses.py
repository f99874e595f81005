"""Ulysses sequence parallelism: ranks share the tokens of a video outside of attention, and its heads inside.

Each of P ranks keeps the same part of every latent frame: with t tokens a frame, ceil(t / P) of them, zeros at the end
of the last rank's where t does not divide. So a rank's tokens still stand frame by frame, modulation by frame needs
nothing new, and a chunk of frames is shared like a whole video. Before attention one all-to-all trades tokens for
heads: every rank then holds all real tokens of N / P heads, and rotation, layout and KV cache work as on one device.
A second all-to-all trades back.

Gradients: every rank of a sequence computes the same loss from the gathered tokens. Each collective's backward is its
adjoint for the sum of the ranks' losses, so the mean of the gradients over all ranks, which ZeRO-3 takes, is the
gradient of the loss: no factor of P appears anywhere.

Shape suffixes: B batch, F latent frames, L this rank's tokens, E width, N heads, D head width, P ranks, S a rank's
tokens of a frame.

Source: DeepSpeed-Ulysses, arXiv:2309.14509.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from afd_scale.layers.attention import AttentionLayout
from afd_scale.layers.kv_cache import Past
from afd_scale.layers.ops import ModelOps
from afd_scale.layers.rope import Rotation, WindowRotation


def ops_over(group: dist.ProcessGroup | None, **options: Any) -> ModelOps:
    """What a network is made of where a group's ranks share a video; without a group, a rank has the whole of it."""
    return ModelOps(**options) if group is None else SequenceParallelOps(group, **options)


class SequenceParallelOps(ModelOps):
    """The tokens of a video on all ranks of a group.

    Args:
        group: of the ranks that share a video.
        options: of `ModelOps`.
    """

    def __init__(self, group: dist.ProcessGroup, **options: Any):
        super().__init__(**options)
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def split_tokens(self, x_BLE: Tensor, frames: int) -> Tensor:
        x_BFPSE = self._share_frames(x_BLE.unflatten(1, (frames, -1)))
        return x_BFPSE[:, :, self.rank].flatten(1, 2)

    def gather_tokens(self, x_BLE: Tensor, frames: int, tokens_per_frame: int) -> Tensor:
        x_PBFSE = _AllGather.apply(x_BLE, self.group).unflatten(2, (frames, -1))
        x_BFtE = x_PBFSE.permute(1, 2, 0, 3, 4).flatten(2, 3)
        return x_BFtE[:, :, :tokens_per_frame].flatten(1, 2)

    def attention(
        self, q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor,
        rotation: Rotation | WindowRotation, layout: AttentionLayout, past: Past | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        frames, tokens = layout.query_frames, rotation.tokens_per_frame
        q, k, v = self._tokens_to_heads(torch.stack([q_BLND, k_BLND, v_BLND]), frames, tokens)
        attended, k, v = super().attention(q, k, v, rotation, layout, past)
        return self._heads_to_tokens(attended, frames), k, v

    def _tokens_to_heads(self, x_3BLND: Tensor, frames: int, tokens: int) -> Tensor:
        """(3, B, F S, N, D) of this rank's tokens -> (3, B, F t, N / P, D) of all tokens."""
        x = x_3BLND.unflatten(3, (self.size, -1)).movedim(3, 0)  # by the rank that takes these heads
        x = _AllToAll.apply(x, self.group).unflatten(3, (frames, -1))  # (P, 3, B, F, S, N / P, D), by tokens
        return x.movedim(0, 3).flatten(3, 4)[:, :, :, :tokens].flatten(2, 3)

    def _heads_to_tokens(self, x_BLND: Tensor, frames: int) -> Tensor:
        """(B, F t, N / P, D) of all tokens -> (B, F S, N, D) of this rank's tokens."""
        x_BFPSND = self._share_frames(x_BLND.unflatten(1, (frames, -1)))
        x = _AllToAll.apply(x_BFPSND.movedim(2, 0).flatten(2, 3), self.group)  # (P, B, F S, N / P, D), by heads
        return x.movedim(0, 2).flatten(2, 3)

    def _share_frames(self, x_BFt: Tensor) -> Tensor:
        """(B, F, t, ...) -> (B, F, P, S, ...), zeros behind the last token."""
        missing = -x_BFt.shape[2] % self.size
        if missing:
            x_BFt = F.pad(x_BFt, (0, 0) * (x_BFt.dim() - 3) + (0, missing))
        return x_BFt.unflatten(2, (self.size, -1))


class _AllToAll(torch.autograd.Function):
    """Part i of the first dimension goes to rank i; the backward sends the gradients back the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grad, ctx.group), None


class _AllGather(torch.autograd.Function):
    """(P, ...) tensors of all ranks; the backward sums what the ranks' losses say of this rank's tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        size = dist.get_world_size(group)
        gathered = x.new_empty((size * x.shape[0], *x.shape[1:]))
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        return gathered.unflatten(0, (size, -1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grad, ctx.group).sum(dim=0), None


def _all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=group)
    return received
