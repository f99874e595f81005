"""Exact attention on torch's own kernels: one call per segment of the layout, on the keys that it sees.

A segment needs no mask and no padding, so the kernel does the work of the visible pairs only: (n + 1) / 2n of a dense
call for n chunks. Slicing under autograd would pad the gradient of each slice to full length; one autograd function
accumulates dK and dV in place instead. It calls the kernels behind `scaled_dot_product_attention` directly because only
they hand out the log-sum-exp that their backward needs, and because what it saves goes through `save_for_backward`,
where activation checkpointing finds it.

Shape suffixes: B batch, L tokens, N heads, D head width. Kernels take (B, N, L, D).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_scale.layers.attention.layout import AttentionLayout, Range, Segment

_aten = torch.ops.aten


def attend(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor, layout: AttentionLayout) -> Tensor:
    """Softmax attention of a layout.

    Args:
        q_BLND: (B, layout.query_frames x tokens, N, D).
        k_BLND, v_BLND: (B, layout.key_frames x tokens, N, D).
    Returns:
        (B, L, N, D) of the queries.
    """
    tokens_per_frame = q_BLND.shape[1] // layout.query_frames
    assert q_BLND.shape[1] == layout.query_frames * tokens_per_frame, "queries do not fit the layout"
    assert k_BLND.shape[1] == layout.key_frames * tokens_per_frame, "keys do not fit the layout"
    if layout.is_full:
        return attend_all(q_BLND, k_BLND, v_BLND)
    # The kernels take it for granted that a head's channels are neighbours; scaled_dot_product_attention looks first.
    q, k, v = ((x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in (q_BLND, k_BLND, v_BLND))
    return _SegmentedAttention.apply(q, k, v, layout.token_segments(tokens_per_frame)).transpose(1, 2)


def attend_all(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor) -> Tensor:
    """Softmax attention of every query to every key; (B, L, N, D) of the queries."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLND, k_BLND, v_BLND))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class _SegmentedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: tuple[Segment, ...]) -> Tensor:
        # Memory as (B, L, N, D): the caller's transpose and flatten then cost nothing.
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        saved: list[Tensor] = []
        for segment in segments:
            q_i = q[:, :, slice(*segment.query)]
            out_i, *statistics = _forward_kernel(q_i, _take(k, segment.keys), _take(v, segment.keys))
            out[:, :, slice(*segment.query)] = out_i
            saved += statistics
        ctx.save_for_backward(q, k, v, out, *saved)
        ctx.segments = segments
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, *saved = ctx.saved_tensors
        per_segment = len(saved) // len(ctx.segments)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i, segment in enumerate(ctx.segments):
            query = slice(*segment.query)
            grad_q_i, grad_k_i, grad_v_i = _backward_kernel(
                grad_out[:, :, query], q[:, :, query], _take(k, segment.keys), _take(v, segment.keys),
                out[:, :, query], saved[i * per_segment : (i + 1) * per_segment],
            )  # fmt: skip
            grad_q[:, :, query] = grad_q_i
            _accumulate(grad_k, grad_k_i, segment.keys)
            _accumulate(grad_v, grad_v_i, segment.keys)
        return grad_q, grad_k, grad_v, None


def _take(x: Tensor, ranges: tuple[Range, ...]) -> Tensor:
    """The keys of some ranges: a view where there is one range."""
    parts = [x[:, :, start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _accumulate(total: Tensor, part: Tensor, ranges: tuple[Range, ...]) -> None:
    offset = 0
    for start, stop in ranges:
        total[:, :, start:stop] += part[:, :, offset : offset + stop - start]
        offset += stop - start


def _forward_kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """The output and the statistics that the same device's backward kernel takes."""
    if q.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    if q.dtype == torch.float32:
        return _aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    out, lse, _, _, _, _, seed, offset, _ = _aten._scaled_dot_product_flash_attention(q, k, v)
    return out, lse, seed, offset


def _backward_kernel(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type == "cpu":
        (lse,) = statistics
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(grad_out, q, k, v, out, lse, 0.0, False)
    lse, seed, offset = statistics
    if q.dtype == torch.float32:
        grads = _aten._scaled_dot_product_efficient_attention_backward(
            grad_out, q, k, v, None, out, lse, seed, offset, 0.0, [True, True, True, False]
        )
        return grads[0], grads[1], grads[2]
    return _aten._scaled_dot_product_flash_attention_backward(
        grad_out, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, False, seed, offset
    )
