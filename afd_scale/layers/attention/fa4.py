"""flash-attn 4 (`pip install flash-attn-4`, a pre-release), compiled on first use for each dtype and head width.

Same calls as flash.py: it has block-sparse kernels too, but a segment needs no mask. Gradients at head width 64 were
wrong for a while (their issue #2623): run tests/gpu/test_attention.py with the installed version before a long run.

Shape suffixes: B batch, L tokens, N heads, D head width. Kernels take (B, L, N, D).
"""

import inspect
from functools import partial

from torch import Tensor

from afd_scale.layers.attention.limits import HALF, Attend, Limits
from afd_scale.layers.attention.segmented import Kernel, attend_segments

# Hopper and Blackwell have a backward pass there.
LIMITS = {"cuda": Limits(dtypes=HALF, head_multiple=8, max_head_dim=128, capabilities=(9, 10))}


def load() -> Attend:
    """Raises ImportError where flash-attn 4 is not installed."""
    from flash_attn.cute import interface

    # flash-attn 2.8 ships an early draft of it under the same name.
    if "return_lse" not in inspect.signature(interface._flash_attn_fwd).parameters:
        raise ImportError("only the draft inside flash-attn 2 is installed")

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        # Newer betas return more after these two.
        out, lse, *_ = interface._flash_attn_fwd(q, k, v, softmax_scale=q.shape[-1] ** -0.5, return_lse=True)
        return out, lse

    def backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        dq, dk, dv = interface._flash_attn_bwd(q, k, v, out, grad_out, lse, softmax_scale=q.shape[-1] ** -0.5)
        return dq, dk, dv

    return partial(attend_segments, kernel=Kernel("flash-attn 4", forward, backward))
