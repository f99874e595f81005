"""The kernels that come with torch: exact on every device.

They are called directly, and not through `scaled_dot_product_attention`, because only the kernels hand out the
log-sum-exp that a segment's backward needs (segmented.py). A GPU gets the kernel that torch itself would take: cuDNN or
flash, or the memory-efficient one in float32. Keys of several ranges are copied side by side: cuDNN and the
memory-efficient kernel lay their log-sum-exp out in their own way.

Shape suffixes: B batch, L tokens, N heads, D head width. The operators take (B, N, L, D).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from afd_scale.layers.attention.layout import AttentionLayout
from afd_scale.layers.attention.limits import Attend, Capability, Limits
from afd_scale.layers.attention.segmented import Kernel, attend_segments

LIMITS = {
    "cpu": Limits(dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16)),
    # Flash and cuDNN take the 16-bit types, the memory-efficient kernel float32; in float64 torch has no kernel that
    # hands out its log-sum-exp.
    "cuda": Limits(
        dtypes=(torch.float32, torch.bfloat16, torch.float16), head_multiple=8, max_head_dim=256, capabilities=(8, 99)
    ),
}
_aten = torch.ops.aten


def load() -> Attend:
    return attend


def attend(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor, layout: AttentionLayout) -> Tensor:
    """Softmax attention of a layout.

    Args:
        q_BLND: (B, layout.query_frames x tokens, N, D).
        k_BLND, v_BLND: (B, layout.key_frames x tokens, N, D).
    Returns:
        (B, L, N, D) of the queries.
    """
    layout.tokens_per_frame(q_BLND.shape[1], k_BLND.shape[1])
    if layout.is_full:
        return attend_all(q_BLND, k_BLND, v_BLND)
    return attend_segments(q_BLND, k_BLND, v_BLND, layout, _kernel(q_BLND, k_BLND, v_BLND))


def attend_all(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor) -> Tensor:
    """Softmax attention of every query to every key; (B, L, N, D) of the queries."""
    q, k, v = q_BLND.transpose(1, 2), k_BLND.transpose(1, 2), v_BLND.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def kernel_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Name of the kernel that a layout's segments get on a device."""
    q, k, v = (torch.empty(1, 128, 1, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    return _kernel(q, k, v).name


def slower_than_cudnn(capability: Capability, cudnn: int | None) -> str | None:
    """Why torch takes flash-attn 2's kernels on a GPU for which it prefers cuDNN's, and what to do; or None.

    Args:
        cudnn: the version that is loaded, as torch.backends.cudnn counts: 91501 is 9.15.1.
    Source: torch 2.13, check_prefer_cudnn_attention in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
    """
    if capability[0] not in (9, 10) or (cudnn is not None and cudnn > 91500):
        return None
    loaded = "no cuDNN is" if cudnn is None else f"cuDNN {version_words(cudnn)} is"
    return (
        f"attention: torch takes flash-attn 2's kernels, on Hopper about half as fast as cuDNN's, because {loaded} "
        "loaded, which it takes above 9.15.0 only: install a cu130 build of torch, which brings one, and keep "
        "an older one of the system off LD_LIBRARY_PATH"
    )


def version_words(cudnn: int) -> str:
    """91002 in the usual form: 9.10.2."""
    return f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}"


def _kernel(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor) -> Kernel:
    if q_BLND.device.type == "cpu":
        return CPU
    if q_BLND.dtype == torch.float32:
        return EFFICIENT
    # scaled_dot_product_attention asks it too; it knows of chips, cuDNN versions and `torch.nn.attention.sdpa_kernel`.
    q, k, v = _heads_first(q_BLND, k_BLND, v_BLND)
    choice = torch._fused_sdp_choice(q, k, v)
    return CUDNN if choice == SDPBackend.CUDNN_ATTENTION.value else FLASH


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, L, N, D) to (B, N, L, D), and back."""
    return tuple(x.transpose(1, 2) for x in tensors)


def _torch_kernel(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Kernel:
    """The kernel of operators that take (B, N, L, D)."""

    def transposed_forward(*qkv: Tensor) -> tuple[Tensor, ...]:
        out, *rest = forward(*_heads_first(*qkv))
        return out.transpose(1, 2), *rest

    def transposed_backward(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        gradients = backward(*_heads_first(grad_out, q, k, v, out), *rest)
        return _heads_first(*gradients[:3])  # the memory-efficient kernel adds a gradient of its bias

    return Kernel(name, transposed_forward, transposed_backward, merges_ranges=False)


def _without_lengths(made: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Output, log-sum-exp, and the random generator's seed and offset."""
    return made[0], made[1], made[6], made[7]


CPU = _torch_kernel(
    "CPU flash",
    _aten._scaled_dot_product_flash_attention_for_cpu,
    lambda *tensors: _aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, 0.0, False),
)
EFFICIENT = _torch_kernel(
    "memory-efficient",
    lambda q, k, v: _aten._scaled_dot_product_efficient_attention(q, k, v, None, True),
    lambda grad_out, q, k, v, *rest: _aten._scaled_dot_product_efficient_attention_backward(
        grad_out, q, k, v, None, *rest, 0.0, [True, True, True, False]
    ),
)
FLASH = _torch_kernel(
    "flash",
    lambda q, k, v: _without_lengths(_aten._scaled_dot_product_flash_attention(q, k, v)),
    lambda grad_out, q, k, v, out, lse, *state: _aten._scaled_dot_product_flash_attention_backward(
        grad_out, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, False, *state
    ),
)
CUDNN = _torch_kernel(
    "cuDNN",
    lambda q, k, v: _without_lengths(_aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)),
    lambda grad_out, q, k, v, out, lse, *state: _aten._scaled_dot_product_cudnn_attention_backward(
        grad_out, q, k, v, out, lse, *state, None, None, None, q.shape[2], k.shape[2], 0.0, False
    ),
)
