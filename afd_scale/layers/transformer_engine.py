"""FP8 linears of Transformer Engine, for GPUs whose tensor cores take 8-bit operands.

The only file that knows the library, which is imported when a run chooses it: without a GPU its import fails. Weights
stay in bf16 and are rounded to FP8 in each pass, so that ZeRO-3, checkpoints and exports see plain parameters.

Source: Transformer Engine 2.20, `pytorch/module/linear.py`, `pytorch/quantization.py`, `pytorch/distributed.py`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd_scale.layers.precision import Precision

ROWS = 16  # of an operand: the weight's gradient is a product along the rows, and FP8 GEMMs take rows of 16 bytes


class TransformerEngineFp8(Precision):
    """Blocks run in an FP8 region, with and without gradient.

    Args:
        scaling: `current` takes a tensor's scale from its own maximum; `delayed` from those of the passes before, which
            are not saved: a resumed run begins a new history.
    Raises:
        ValueError: the library or the GPU cannot do it.
    """

    def __init__(self, scaling: str, keep_blocks: int = 0):
        super().__init__(keep_blocks)
        try:
            import transformer_engine.pytorch as te
            from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling
        except (ImportError, OSError, RuntimeError) as error:  # it, or a library of its own, is not there
            reason = str(error).partition("\n")[0]
            raise ValueError(f"precision (fp8) must find Transformer Engine on a GPU: {reason}; install "
                             "afd-scale[transformer-engine] or take bf16") from error  # fmt: skip
        available, reason = te.is_fp8_available(return_reason=True)
        if not available:
            raise ValueError(f"precision (fp8) must be bf16 on this GPU: {reason}")
        self._te, self._delayed = te, scaling == "delayed"
        self._recipe = DelayedScaling(reduce_amax=False) if self._delayed else Float8CurrentScaling()
        self._linear = _linear_class(te.Linear)

    def linear(self, in_features: int, out_features: int) -> nn.Module:
        # Begins as the models let nn.Linear begin; the bias is zero by default.
        return self._linear(in_features, out_features, init_method=nn.init.xavier_uniform_)

    def run_block(self, block: Callable[..., Any], *arguments: Any, recompute: bool) -> Any:
        if recompute and self._delayed and torch.is_grad_enabled():
            # Recomputation must find the scales of the first pass. The library's other, non-reentrant form runs a block
            # to its end again, which fails under ZeRO-3 for the reason given in Precision.
            return self._in_region(partial(self._te.checkpoint, use_reentrant=True), block, *arguments)
        # Current scaling has no state. The region is part of what is recomputed.
        return super().run_block(self._in_region, block, *arguments, recompute=recompute)

    def _in_region(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with_gradient = torch.is_grad_enabled()
        # Delayed scales follow when the region is left, and only where gradients are on: without the outer switch a
        # policy that is only sampled from would keep its first scales.
        with (
            torch.enable_grad(),
            self._te.autocast(enabled=True, recipe=self._recipe),
            torch.set_grad_enabled(with_gradient),
        ):
            return function(*arguments)


def _linear_class(te_linear: type[nn.Module]) -> type[nn.Module]:
    """te.Linear for any number of rows, with the parameters of nn.Linear as its only state."""

    class PaddedLinear(te_linear):  # type: ignore[misc, valid-type]
        # Without these an `_extra_state` would stand beside the parameters in every checkpoint.
        get_extra_state = nn.Module.get_extra_state
        set_extra_state = nn.Module.set_extra_state

        def forward(self, x: Tensor) -> Tensor:
            rows = math.prod(x.shape[:-1])
            missing = -rows % ROWS
            if not missing:
                return super().forward(x)
            padded = F.pad(x.flatten(0, -2), (0, 0, 0, missing))
            return super().forward(padded)[:rows].unflatten(0, x.shape[:-1])

    return PaddedLinear
