"""flash-attn 2 and 3 (github.com/Dao-AILab/flash-attention): the same calls, 3 being Hopper's and the faster one there.

Both return a log-sum-exp of (B, N, L), so key ranges are merged and no key is ever copied.

Shape suffixes: B batch, L tokens, N heads, D head width. Kernels take (B, L, N, D).
"""

from functools import partial

import torch
from torch import Tensor

from afd_scale.layers.attention.limits import HALF, Attend, Limits
from afd_scale.layers.attention.segmented import Kernel, attend_segments

LIMITS_2 = {"cuda": Limits(dtypes=HALF, head_multiple=8, max_head_dim=256, capabilities=(8, 99))}
LIMITS_3 = {"cuda": Limits(dtypes=HALF, head_multiple=8, max_head_dim=256, capabilities=(9, 9))}


def load_2() -> Attend:
    """Raises ImportError where flash-attn 2.7 or later is not installed."""
    import flash_attn
    from flash_attn import flash_attn_interface

    if tuple(int(part) for part in flash_attn.__version__.split(".")[:2]) < (2, 7):
        raise ImportError(f"{flash_attn.__version__} is installed")

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, lse, _, _ = flash_attn_interface._flash_attn_forward(
            q, k, v, dropout_p=0.0, softmax_scale=_scale(q), causal=False, window_size_left=-1, window_size_right=-1,
            softcap=0.0, alibi_slopes=None, return_softmax=False,
        )  # fmt: skip
        return out, lse

    def backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *made: Tensor) -> tuple[Tensor, ...]:
        gradients = _empty_like(q, k, v)
        flash_attn_interface._flash_attn_backward(
            grad_out, q, k, v, *made, *gradients, dropout_p=0.0, softmax_scale=_scale(q), causal=False,
            window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=False,
        )  # fmt: skip
        return gradients

    return partial(attend_segments, kernel=Kernel("flash-attn 2", forward, backward))


def load_3() -> Attend:
    """Raises ImportError where flash-attn 3 is not installed, or older than the defaults of its operators."""
    import flash_attn_3._C  # noqa: F401  registers the operators

    # The operators: their schema held still while the Python functions around them changed twice.
    operators = torch.ops.flash_attn_3
    if not operators.fwd.default._schema.arguments[3].has_default_value():
        raise ImportError("a build of before summer 2025 is installed")

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, lse, _, _ = operators.fwd(q, k, v, softmax_scale=_scale(q), num_splits=1)
        return out, lse

    def backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *made: Tensor) -> tuple[Tensor, ...]:
        dq, dk, dv = _empty_like(q, k, v)
        operators.bwd(grad_out, q, k, v, *made, dq=dq, dk=dk, dv=dv, softmax_scale=_scale(q))
        return dq, dk, dv

    return partial(attend_segments, kernel=Kernel("flash-attn 3", forward, backward))


def _scale(q: Tensor) -> float:
    return q.shape[-1] ** -0.5


def _empty_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)
