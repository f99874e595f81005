"""flash-attn 2 and 3 (github.com/Dao-AILab/flash-attention): the same calls, 3 being Hopper's and the faster one there.

Both return a log-sum-exp of (B, N, L), so key ranges are merged and no key is ever copied.

Shape suffixes: B batch, L tokens, N heads, D head width. Kernels take (B, L, N, D).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from afd_scale.layers.attention.limits import HALF, Attend, Limits
from afd_scale.layers.attention.segmented import Gradients, attend_segments

LIMITS_2 = {"cuda": Limits(dtypes=HALF, head_multiple=8, max_head_dim=256, capabilities=(8, 99))}
LIMITS_3 = {"cuda": Limits(dtypes=HALF, head_multiple=8, max_head_dim=256, capabilities=(9, 9))}


def load_2() -> Attend:
    """Raises ImportError where flash-attn 2.7 or later is not installed."""
    import flash_attn
    from flash_attn import flash_attn_interface

    if tuple(int(part) for part in flash_attn.__version__.split(".")[:2]) < (2, 7):
        raise ImportError(f"{flash_attn.__version__} is installed")
    return partial(attend_segments, kernel=FlashAttention2(flash_attn_interface))


def load_3() -> Attend:
    """Raises ImportError where flash-attn 3 is not installed, or older than the defaults of its operators."""
    import flash_attn_3._C  # noqa: F401  registers the operators

    operators = torch.ops.flash_attn_3
    if not operators.fwd.default._schema.arguments[3].has_default_value():
        raise ImportError("a build of before summer 2025 is installed")
    return partial(attend_segments, kernel=FlashAttention3(operators))


class FlashAttention2:
    merges_ranges = True

    def __init__(self, interface: Any):
        self.interface = interface

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        out, lse, _, _ = self.interface._flash_attn_forward(
            q, k, v, dropout_p=0.0, softmax_scale=_scale(q), causal=False, window_size_left=-1, window_size_right=-1,
            softcap=0.0, alibi_slopes=None, return_softmax=False,
        )  # fmt: skip
        return out, lse, ()

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rest: tuple[Tensor, ...]
    ) -> Gradients:
        grad_q, grad_k, grad_v = _empty_gradients(q, k, v)
        self.interface._flash_attn_backward(
            grad_out, q, k, v, out, lse, grad_q, grad_k, grad_v, dropout_p=0.0, softmax_scale=_scale(q), causal=False,
            window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=False,
        )  # fmt: skip
        return grad_q, grad_k, grad_v


class FlashAttention3:
    """Calls the operators: their schema held still while the Python functions around them changed twice."""

    merges_ranges = True

    def __init__(self, operators: Any):
        self.operators = operators

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        out, lse, _, _ = self.operators.fwd(q, k, v, softmax_scale=_scale(q), num_splits=1)
        return out, lse, ()

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rest: tuple[Tensor, ...]
    ) -> Gradients:
        grad_q, grad_k, grad_v = _empty_gradients(q, k, v)
        self.operators.bwd(
            grad_out, q, k, v, out, lse, dq=grad_q, dk=grad_k, dv=grad_v, softmax_scale=_scale(q)
        )  # fmt: skip
        return grad_q, grad_k, grad_v


def _scale(q: Tensor) -> float:
    return q.shape[-1] ** -0.5


def _empty_gradients(*tensors: Tensor) -> Gradients:
    grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)
    return grad_q, grad_k, grad_v
