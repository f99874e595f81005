"""Exact attention of a layout on any kernel that hands out its log-sum-exp: one call per segment, on the keys it sees.

A segment needs no mask and no padding, so the kernel does the work of the visible pairs only: (n + 1) / 2n of a dense
call for n chunks. Slicing under autograd would pad the gradient of each slice to full length; one autograd function
accumulates dK and dV in place instead, and what it saves goes through `save_for_backward`, where activation
checkpointing finds it.

A segment whose keys are several ranges (a sink, a window, noisy keys after clean ones) is computed in one of two ways.
Either the keys are copied side by side, or each range R is a call of its own and the results are merged:

    lse = log sum_R exp(lse_R)        out = sum_R exp(lse_R - lse) out_R

Backward needs nothing new. A kernel rebuilds its probabilities as exp(q k - lse) and takes D = sum(grad_out * out); of
the merged `lse` and `out` these are those of the whole softmax, so the call on R gives dK and dV of R exactly, and its
part of dQ.

A key's gradients are sums over all segments that see it, 63 of them in a long video by single frames. In 16 bits each
addition rounds, so dK and dV are added up in float32 and rounded once: while the backward pass of one attention lasts,
they take 8 bytes a key and channel instead of 4, and 4 more for the rounded copies at its end.

Shape suffixes: B batch, L tokens, N heads, D head width. A log-sum-exp is (B, N, L) in float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from afd_scale.layers.attention.layout import AttentionLayout, Range, Segment


@dataclass(frozen=True)
class Kernel:
    """Attention of all queries to all keys, (B, L, N, D) each; must not write to its inputs.

    Attributes:
        forward: of q, k and v: the output, its log-sum-exp, and what else the backward pass takes.
        backward: of the output's gradient, q, k, v and all that forward gave: gradients of q, k and v.
        merges_ranges: one call per key range, merged: needs a log-sum-exp of exactly (B, N, L). Otherwise keys are
            copied.
    """

    name: str
    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]
    merges_ranges: bool = True


def attend_segments(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor, layout: AttentionLayout, kernel: Kernel) -> Tensor:
    """Softmax attention of a layout; shapes as in `attend`."""
    tokens_per_frame = layout.tokens_per_frame(q_BLND.shape[1], k_BLND.shape[1])
    # Kernels take it for granted that a head's channels are neighbours; scaled_dot_product_attention looks first.
    q, k, v = (_neighbouring_channels(x) for x in (q_BLND, k_BLND, v_BLND))
    return _SegmentedAttention.apply(q, k, v, layout.token_segments(tokens_per_frame), kernel)


class _SegmentedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: tuple[Segment, ...], kernel: Kernel) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        log_sums: list[Tensor] = []
        rests: list[tuple[Tensor, ...]] = []
        for segment in segments:
            query = slice(*segment.query)
            parts = [kernel.forward(q[:, query], _take(k, c), _take(v, c)) for c in _calls(segment, kernel)]
            out[:, query], lse = _merge([part[0] for part in parts], [part[1] for part in parts])
            log_sums.append(lse)
            rests += [part[2:] for part in parts]
        ctx.save_for_backward(q, k, v, out, *log_sums, *chain.from_iterable(rests))
        ctx.segments, ctx.kernel, ctx.rest_length = segments, kernel, len(rests[0])
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, *saved = ctx.saved_tensors
        grad_out = _neighbouring_channels(grad_out)
        grad_q, wide = torch.empty_like(q), torch.promote_types(q.dtype, torch.float32)
        # A segment alone gives each key one contribution: there is nothing to add up.
        grad_k, grad_v = (torch.zeros_like(x, dtype=wide if len(ctx.segments) > 1 else None) for x in (k, v))
        rests = iter(saved[len(ctx.segments) :])
        for segment, lse in zip(ctx.segments, saved[: len(ctx.segments)], strict=False):
            query = slice(*segment.query)
            parts_q: list[Tensor] = []
            for call in _calls(segment, ctx.kernel):
                rest = islice(rests, ctx.rest_length)
                grad_q_i, grad_k_i, grad_v_i = ctx.kernel.backward(
                    grad_out[:, query], q[:, query], _take(k, call), _take(v, call), out[:, query], lse, *rest
                )
                parts_q.append(grad_q_i)
                _accumulate(grad_k, grad_k_i, call)
                _accumulate(grad_v, grad_v_i, call)
            grad_q[:, query] = parts_q[0] if len(parts_q) == 1 else sum(part.to(wide) for part in parts_q)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _calls(segment: Segment, kernel: Kernel) -> list[tuple[Range, ...]]:
    """The key ranges of each kernel call of a segment."""
    return [(key_range,) for key_range in segment.keys] if kernel.merges_ranges else [segment.keys]


def _merge(outs: Sequence[Tensor], log_sums: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the keys of several calls; computed in float32 or wider."""
    if len(outs) == 1:
        return outs[0], log_sums[0]
    stacked = torch.stack(list(log_sums))
    # Kernels read it by its address alone: contiguous.
    lse = stacked.logsumexp(0).contiguous()
    shares = (stacked - lse).exp().transpose(2, 3).unsqueeze(-1)  # (ranges, B, L, N, 1)
    merged = shares[0] * outs[0]
    for share, out in zip(shares[1:], outs[1:], strict=True):
        merged = torch.addcmul(merged, share, out.to(merged.dtype))
    return merged, lse


def _take(x: Tensor, ranges: tuple[Range, ...]) -> Tensor:
    """The keys of some ranges: a view where there is one range."""
    parts = [x[:, start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _accumulate(total: Tensor, part: Tensor, ranges: tuple[Range, ...]) -> None:
    offset = 0
    for start, stop in ranges:
        total[:, start:stop] += part[:, offset : offset + stop - start]
        offset += stop - start


def _neighbouring_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
