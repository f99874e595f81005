"""FP8 linears of Transformer Engine, for GPUs whose tensor cores take 8-bit operands; by NVFP4 also of 4 bits.

The only file that knows the library, which is imported when a run chooses it: without a GPU its import fails. Weights
stay in bf16 and are rounded to FP8 in each pass, so that ZeRO-3, checkpoints and exports see plain parameters.

Source: Transformer Engine 2.20, `pytorch/module/linear.py`, `pytorch/quantization.py`, `pytorch/distributed.py`,
`common/recipe/__init__.py`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd_scale.layers.precision import Precision, Recompute

# Recipes by `fp8_scaling`: class, what says whether the GPU can, and the multiple that rows are padded to. The weight's
# gradient is a product along the rows: tensor cores take rows of 16 bytes, and mxfp8 and nvfp4 scale 32 and 16 values.
RECIPES = {
    "current": ("Float8CurrentScaling", "is_fp8_available", 16),
    "delayed": ("DelayedScaling", "is_fp8_available", 16),
    "block": ("Float8BlockScaling", "is_fp8_block_scaling_available", 16),
    "mxfp8": ("MXFP8BlockScaling", "is_mxfp8_available", 32),
    "nvfp4": ("NVFP4BlockScaling", "is_nvfp4_available", 32),
}


class TransformerEngineFp8(Precision):
    """Blocks run in an FP8 region, with and without gradient.

    Args:
        scaling: one of RECIPES. All but `delayed` take scales from the values themselves; `delayed` from those of the
            passes before, which are not saved: a resumed run begins a new history.
    Raises:
        ValueError: the library or the GPU cannot do it.
    """

    def __init__(self, scaling: str, keep_blocks: int = 0):
        super().__init__(keep_blocks)
        if scaling not in RECIPES:
            raise ValueError(f"fp8_scaling ({scaling}) must be one of {', '.join(RECIPES)} on a GPU: Transformer "
                             "Engine has no such recipe")  # fmt: skip
        name, check, rows = RECIPES[scaling]
        try:
            import transformer_engine.pytorch as te
            from transformer_engine.common import recipe as recipes

            there = hasattr(recipes, name) and hasattr(te, check)
        except (ImportError, OSError, RuntimeError) as error:  # it, or a library of its own, is not there
            reason = str(error).partition("\n")[0]
            raise ValueError(f"precision (fp8) must find Transformer Engine on a GPU: {reason}; install "
                             "afd-scale[transformer-engine] or take bf16") from error  # fmt: skip
        if not there:
            raise ValueError(f"fp8_scaling ({scaling}) must be known to the Transformer Engine that is installed: it "
                             f"has no {name} or no {check}; update it or take current")  # fmt: skip
        able, reason = te.is_fp8_available(return_reason=True)
        if not able:
            raise ValueError(f"precision (fp8) must be bf16 on this GPU: {reason}")
        able, reason = getattr(te, check)(return_reason=True)
        if not able:
            raise ValueError(f"fp8_scaling ({scaling}) must be one that this GPU can, current for one: {reason}")
        self._te, self._delayed = te, scaling == "delayed"
        self._recipe = getattr(recipes, name)(**({"reduce_amax": False} if self._delayed else {}))
        self._linear = _linear_class(te.Linear, rows)

    def linear(self, in_features: int, out_features: int) -> nn.Module:
        # Begins as the models let nn.Linear begin; the bias is zero by default.
        return self._linear(in_features, out_features, init_method=nn.init.xavier_uniform_)

    def run_block(self, block: Callable[..., Any], *arguments: Any, recompute: Recompute) -> Any:
        if recompute != "none" and self._delayed and torch.is_grad_enabled():
            # Recomputation must find the scales of the first pass. The library's other, non-reentrant form runs a block
            # to its end again, which fails under ZeRO-3 for the reason given in Precision. It keeps no attention.
            return self._in_region(partial(self._te.checkpoint, use_reentrant=True), block, *arguments)
        # Other recipes have no state. The region is part of what is recomputed.
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


def _linear_class(te_linear: type[nn.Module], multiple: int) -> type[nn.Module]:
    """te.Linear for any number of rows, not only a multiple; the parameters of nn.Linear are its only state."""

    class PaddedLinear(te_linear):  # type: ignore[misc, valid-type]
        # Without these an `_extra_state` would stand beside the parameters in every checkpoint.
        get_extra_state = nn.Module.get_extra_state
        set_extra_state = nn.Module.set_extra_state

        def forward(self, x: Tensor) -> Tensor:
            rows = math.prod(x.shape[:-1])
            missing = -rows % multiple
            if not missing:
                return super().forward(x)
            padded = F.pad(x.flatten(0, -2), (0, 0, 0, missing))
            return super().forward(padded)[:rows].unflatten(0, x.shape[:-1])

    return PaddedLinear
