"""A GPU's tensors without a GPU: shapes, dtypes and devices are followed, nothing is computed.

Two devices stand for the GPU. Fake CUDA tensors do for passes without gradient. Autograd asks a tensor's device for a
guard, and a CPU build of torch, which has none for CUDA, ends the process: with gradient it is fake "meta" tensors. To
code that asks a tensor for its device both are no CPU, and neither may meet a CPU tensor.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

WITHOUT_GRADIENT = torch.device("cuda")
WITH_GRADIENT = torch.device("meta")
_aten = torch.ops.aten


@contextlib.contextmanager
def fake_gpu(device: torch.device) -> Iterator[None]:
    """All tensors that are made here are fake; those of `device`, one of the two above, are the GPU's.

    What a CPU build of torch cannot do with them, or does in another way than a GPU, `STAND_INS` do.
    """
    with FakeTensorMode(), _StandIns(), torch.set_grad_enabled(device == WITH_GRADIENT):
        yield


def on_gpu(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type != "cpu"


class _FusedRMSNorm(torch.autograd.Function):
    """One operator forward and one backward; below autograd, which on a CPU build takes it apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y, rstd = _aten._fused_rms_norm(x, shape, weight, eps)
        ctx.save_for_backward(x, rstd, weight)
        ctx.shape = shape
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        x, rstd, weight = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
        with torch._C._AutoDispatchBelowAutograd():
            grad_x, grad_weight = _aten._fused_rms_norm_backward(grad_y, x, ctx.shape, rstd, weight, wanted)
        return grad_x, None, grad_weight, None


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    if weight is not None and weight.dtype != x.dtype:
        return torch.rms_norm(x, shape, weight, eps)  # no kernel takes two dtypes on a GPU either
    return _FusedRMSNorm.apply(x, list(shape), weight, eps)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    assert not enable_gqa, "cuDNN's operator takes as many heads of keys as of queries"
    for_backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return _aten._scaled_dot_product_cudnn_attention(
        q, k, v, attn_mask, for_backward, dropout_p, is_causal, False, scale=scale
    )[0]


def _backward(loss: Tensor, **options: Any) -> None:
    """torch.autograd.backward without the look for modes: torch leaves a mode while a call that it saw lasts."""
    assert not any(options.values()), f"options ({options}) must be left out: this is backward() alone"
    _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True,
                         accumulate_grad=True)  # fmt: skip


def _cudnn(*arguments: Any, **options: Any) -> int:
    return SDPBackend.CUDNN_ATTENTION.value


def _take(x: Tensor, index: Any) -> Tensor:
    """x[index] through operators alone: torch's own way changes to the tensor's device in between."""
    index = index if isinstance(index, tuple) else (index,)
    rest = [slice(None)] * (x.dim() - sum(1 for i in index if i is not None and i is not Ellipsis))
    written_out = [i for part in index for i in (rest if part is Ellipsis else [part])]
    dim = 0
    for i in written_out:
        if i is None:
            x, dim = _aten.unsqueeze(x, dim), dim + 1
        elif isinstance(i, int):
            x = _aten.select(x, dim, i)
        elif isinstance(i, slice):
            x = x if i == slice(None) else _aten.slice(x, dim, i.start, i.stop, 1 if i.step is None else i.step)
            dim += 1
        elif isinstance(i, Tensor) and len([each for each in index if isinstance(each, Tensor)]) == 1:
            i = _aten.nonzero(i) if i.dtype == torch.bool else i
            x, dim = _aten.index(x, [None] * dim + [i]), dim + i.dim()
        else:
            raise TypeError(f"index ({index}) must be of numbers, slices, None, an ellipsis and at most one tensor")
    return x


def _contiguous(x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return x if x.is_contiguous(memory_format=memory_format) else _aten.clone(x, memory_format=memory_format)


def _put(x: Tensor, index: Any, value: Any) -> None:
    target = _take(x, index)
    if isinstance(value, Tensor):
        _aten.copy_(target, value)
    else:
        _aten.fill_(target, value)


# What a CPU build of torch does differently, and what is put in its place on a fake GPU's tensors. `rms_norm` and
# `scaled_dot_product_attention` are taken apart there; on a GPU in bf16 each is one kernel (torch 2.13; attention by
# cuDNN or flash, afd_scale/layers/attention/sdpa.py). Layer norm, GELU, addcmul and a linear with bias are one operator
# on any device. The rest are bindings that look for a CUDA runtime before they reach an operator.
STAND_INS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.nn.functional.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    torch.nn.functional.scaled_dot_product_attention: _attention,
    torch._fused_sdp_choice: _cudnn,
    Tensor.__getitem__: _take,
    Tensor.__setitem__: _put,
    Tensor.contiguous: _contiguous,
    Tensor.__float__: lambda x: float(x.item()),
    Tensor.__int__: lambda x: int(x.item()),
    Tensor.copy_: _aten.copy_,
    Tensor.nonzero: _aten.nonzero,
    torch.nonzero: _aten.nonzero,
}


class _StandIns(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.backward:
            with self:
                return _backward(*args, **(kwargs or {}))
        stand_in = STAND_INS.get(function) if any(map(on_gpu, args)) else None
        return (stand_in or function)(*args, **(kwargs or {}))
