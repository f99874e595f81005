"""One layer of a Wan transformer: self-attention, cross-attention to the text, feed-forward, modulated by time.

Shape suffixes: B batch, F latent frames, L tokens, E width, N heads, D head width, T text rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from afd_scale.config.models import WanConfig
from afd_scale.layers.attention import AttentionLayout, attend_all
from afd_scale.layers.kv_cache import Pair, Past
from afd_scale.layers.lora import adapted, add_together
from afd_scale.layers.ops import ModelOps
from afd_scale.layers.rope import Rotation, WindowRotation


class RMSNorm(nn.Module):
    """Root-mean-square norm over all heads together; torch computes it in float32 at least."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.shape, self.eps = (width,), eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.rms_norm(x, self.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Projections and query-key norms that self- and cross-attention have in common."""

    def __init__(self, dim: int, num_heads: int, eps: float, ops: ModelOps):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (ops.linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.fused: tuple[Tensor, ...] | None = None  # see `fuse`

    def project(self, x_BLE: Tensor, adapter: str | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the same tokens, (B, L, N, D) each."""
        linears = (self.q, self.k, self.v)
        separate = self.fused is None or torch.is_grad_enabled()
        products = [linear(x_BLE) for linear in linears] if separate else self._products(x_BLE)
        q, k, v = add_together(linears, x_BLE, products, adapter)
        return self._heads(self.norm_q(q)), self._heads(self.norm_k(k)), self._heads(v)

    def queries(self, x_BLE: Tensor, adapter: str | None) -> Tensor:
        return self._heads(self.norm_q(adapted(self.q, x_BLE, adapter)))

    def keys_and_values(self, source_BLE: Tensor, adapter: str | None) -> tuple[Tensor, Tensor]:
        k, v = adapted(self.k, source_BLE, adapter), adapted(self.v, source_BLE, adapter)
        return self._heads(self.norm_k(k)), self._heads(v)

    def output(self, attended_BLND: Tensor, adapter: str | None) -> Tensor:
        return adapted(self.o, attended_BLND.flatten(2), adapter)

    def fuse(self) -> None:
        """Let q, k and v be one product where there is no gradient; their weights become parts of one tensor."""
        linears = [x for x in (self.q, self.k, self.v) if type(x) is nn.Linear]  # others have kernels of their own
        if len(linears) == 3:
            weights, biases = (side_by_side([getattr(x, name) for x in linears]) for name in ("weight", "bias"))
            self.fused = weights.unflatten(0, (3, -1)).transpose(1, 2), biases.view(3, 1, -1)

    def _products(self, x_BLE: Tensor) -> Sequence[Tensor]:
        """A batched product and not a wide one: q and k leave it contiguous, as norms want them."""
        assert self.fused is not None
        weights_3EE, biases_31E = self.fused
        x_3LE = x_BLE.reshape(1, -1, x_BLE.shape[2]).expand(3, -1, -1)
        return torch.baddbmm(biases_31E, x_3LE, weights_3EE).view(3, *x_BLE.shape).unbind()

    def _heads(self, x_BLE: Tensor) -> Tensor:
        videos, tokens, _ = x_BLE.shape
        return x_BLE.reshape(videos, tokens, self.num_heads, -1)


class FeedForward(nn.ModuleList):
    """Two linears around a GELU; a list for the names of its parameters, 0 and 2."""

    def __init__(self, dim: int, hidden: int, ops: ModelOps):
        super().__init__([ops.linear(dim, hidden), nn.GELU(approximate="tanh"), ops.linear(hidden, dim)])

    def forward(self, x_BLE: Tensor, adapter: str | None) -> Tensor:
        into, activation, out = self
        return adapted(out, activation(adapted(into, x_BLE, adapter)), adapter)


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; modulated by each latent frame's time.

    What stands before and after self-attention may be compiled: neither knows of caches, layouts or other ranks.
    """

    def __init__(self, config: WanConfig, ops: ModelOps):
        super().__init__()
        dim, eps = config.dim, config.eps
        self.ops = ops
        self.norm1 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = Attention(dim, config.num_heads, eps, ops)
        self.norm3 = nn.LayerNorm(dim, eps)
        self.cross_attn = Attention(dim, config.num_heads, eps, ops)
        self.norm2 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = FeedForward(dim, config.ffn_dim, ops)
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.before_attention, self.after_attention = ops.compiled(Block._before), ops.compiled(Block._after)

    def forward(
        self, x_BLE: Tensor, time_BF6E: Tensor, time_is_added: bool, text_BTE: Tensor | None,
        rotation: Rotation | WindowRotation, layout: AttentionLayout, past: Past | None, adapter: str | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The tokens after this layer, and its keys and values (plain tensors: ZeRO-3 hooks what a module returns).

        Args:
            time_is_added: `time_BF6E` is this block's already, its modulation included.
            text_BTE: None where the past has its keys and values.
        """
        modulated = time_BF6E if time_is_added else add_time(self.modulation, time_BF6E)
        shift1, scale1, gate1, shift2, scale2, gate2 = apart(modulated)
        q, k, v = self.before_attention(self, x_BLE, shift1, scale1, adapter)
        attended, k, v = self.ops.attention(q, k, v, rotation, layout, past)

        def project_text() -> Pair:
            assert text_BTE is not None, "no pass before this one has read the text"
            return self.cross_attn.keys_and_values(text_BTE, adapter)

        text_kv = project_text() if past is None else past.text(project_text)
        x_BLE = self.after_attention(
            self, x_BLE, attended, *text_kv, gate1, shift2, scale2, gate2, adapter
        )  # fmt: skip
        return x_BLE, k, v

    def fuse(self) -> None:
        """See `Network.fuse`; on one that is fused already it does nothing."""
        if self.self_attn.fused is None:
            self.self_attn.fuse()

    def _before(
        self, x_BLE: Tensor, shift: Tensor, scale: Tensor, adapter: str | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.project(modulate(self.norm1(x_BLE), shift, scale), adapter)

    def _after(
        self, x_BLE: Tensor, attended_BLND: Tensor, text_k: Tensor, text_v: Tensor,
        gate1: Tensor, shift2: Tensor, scale2: Tensor, gate2: Tensor, adapter: str | None,
    ) -> Tensor:  # fmt: skip
        x_BLE = add_gated(x_BLE, self.self_attn.output(attended_BLND, adapter), gate1)
        read = attend_all(self.cross_attn.queries(self.norm3(x_BLE), adapter), text_k, text_v)
        x_BLE = x_BLE + self.cross_attn.output(read, adapter)
        return add_gated(x_BLE, self.ffn(modulate(self.norm2(x_BLE), shift2, scale2), adapter), gate2)


def modulate(x_BLE: Tensor, shift_BF1E: Tensor, scale_BF1E: Tensor) -> Tensor:
    """x scale + shift, with one shift and scale for all tokens of a latent frame."""
    return torch.addcmul(shift_BF1E, frame_by_frame(x_BLE, shift_BF1E), scale_BF1E).view(x_BLE.shape)


def add_gated(x_BLE: Tensor, y_BLE: Tensor, gate_BF1E: Tensor) -> Tensor:
    """x + gate y, with one gate for all tokens of a latent frame."""
    x, y = frame_by_frame(x_BLE, gate_BF1E), frame_by_frame(y_BLE, gate_BF1E)
    return torch.addcmul(x, y, gate_BF1E).view(x_BLE.shape)


def frame_by_frame(x_BLE: Tensor, of_frames_BF1E: Tensor) -> Tensor:
    """(B, F, L / F, E)."""
    videos, _, width = x_BLE.shape
    return x_BLE.reshape(videos, of_frames_BF1E.shape[1], -1, width)


def add_time(modulation: Tensor, time_BFXE: Tensor) -> Tensor:
    """Shift, scale and gate, twice over or once, of each latent frame; scales are about one: 1 is added to them."""
    modulated = modulation + time_BFXE
    modulated[..., 1::3, :] += 1
    return modulated


def apart(modulated_BFXE: Tensor) -> tuple[Tensor, ...]:
    """(B, F, 1, E) each, for all tokens of a frame."""
    return modulated_BFXE.unsqueeze(3).unbind(2)


def side_by_side(parameters: Sequence[nn.Parameter]) -> Tensor:
    """One tensor of several parameters, along their first dimension; they become views of it."""
    joined = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, joined.split([len(p) for p in parameters]), strict=True):
        parameter.data = part
    return joined
