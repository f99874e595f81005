"""RoPE of queries and keys as one Triton kernel: each number is read once and written once.

A program takes TOKENS tokens of one head of one video, the queries' and the keys'.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 16  # 16 tokens of 128 channels in bf16: 4 KiB a program


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    q, k, q_turns, k_turns, q_out, k_out, q_tokens, k_tokens, heads,
    q_b, q_l, q_n, k_b, k_l, k_n, qo_b, qo_l, qo_n, ko_b, ko_l, ko_n,
    APART: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    row = tl.program_id(1)
    video, head = (row // heads).to(tl.int64), row % heads
    both = tl.arange(0, 2 * WIDTH)
    for which in tl.static_range(2):
        if which == 0:
            turns = q_turns
            tokens = q_tokens
            source = q + video * q_b + head * q_n + token[:, None] * q_l
            target = q_out + video * qo_b + head * qo_n + token[:, None] * qo_l
        else:
            turns = k_turns
            tokens = k_tokens
            source = k + video * k_b + head * k_n + token[:, None] * k_l
            target = k_out + video * ko_b + head * ko_n + token[:, None] * ko_l
        inside_both = (token[:, None] < tokens) & (both[None, :] < 2 * PAIRS)
        if which * (1 - APART) == 0:  # queries and keys of the same tokens share their angles
            turn = tl.load(turns + token[:, None] * (2 * PAIRS) + both[None, :], mask=inside_both, other=0.0)
            cos, sin = tl.split(tl.reshape(turn, (TOKENS, WIDTH, 2)))
        x = tl.load(source + both[None, :], mask=inside_both, other=0.0).to(tl.float32)
        real, imaginary = tl.split(tl.reshape(x, (TOKENS, WIDTH, 2)))
        y = tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos)
        y = tl.reshape(y, (TOKENS, 2 * WIDTH))
        tl.store(target + both[None, :], y.to(target.dtype.element_ty), mask=inside_both)


def launch(q: Tensor, k: Tensor, q_turns_L1P2: Tensor, k_turns_K1P2: Tensor, q_out: Tensor, k_out: Tensor) -> None:
    """Rotate (B, L, N, D) queries and (B, K, N, D) keys by (L, 1, D / 2, 2) and (K, 1, D / 2, 2) cosines and sines."""
    videos, q_tokens, heads, width = q.shape
    k_tokens = k.shape[1]
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    grid = (triton.cdiv(max(q_tokens, k_tokens), TOKENS), videos * heads)
    strides = [x.stride(axis) for x in (q, k, q_out, k_out) for axis in range(3)]
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():  # Triton launches on the current one
        _rotate[grid](
            q, k, q_turns_L1P2, k_turns_K1P2, q_out, k_out, q_tokens, k_tokens, heads, *strides,
            APART=int(q_turns_L1P2 is not k_turns_K1P2), PAIRS=width // 2,
            WIDTH=triton.next_power_of_2(width // 2), TOKENS=TOKENS,
        )  # fmt: skip
