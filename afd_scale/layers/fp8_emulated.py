"""FP8 linears by rounding, on any device: a stand-in for the numbers of FP8 training, at none of its speed.

    y  = q(x) q(W)^T + b
    dx = q(g) q(W)              g is the gradient of y
    dW = q(g)^T q(x)
    db = sum of g               not rounded

q cuts an operand into tiles, scales each so that its largest magnitude becomes the format's largest number (the maximum
is that of the rows of one rank) and rounds to the nearest. Products of rounded values are summed in float32 and leave
rounded once, to the dtype of x: what tensor cores do. The tiles are those of `Tiling`, by the name of the scaling:

    current   one tile a tensor; gradients in e5m2, whose range is wider     Float8CurrentScaling of Transformer Engine
    row       a row of values that are summed over, of each operand          no recipe there; torchao's `rowwise`
    block     128 such values; of the weight 128 x 128                       Float8BlockScaling
    mxfp8     32 such values                                                 MXFP8BlockScaling

Only tensor-wide tiles are the same when an operand is transposed for another product; the others are cut anew, from the
unrounded values, and their scales are powers of two.

Sources: FP8 Formats for Deep Learning, arXiv:2209.05433; DeepSeek-V3, arXiv:2412.19437, sec. 3.3.2 (block);
OCP Microscaling Formats 1.0 (mxfp8).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from afd_scale.layers.precision import Precision

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class Tiling:
    """What shares a scale in the operands of a product, as matrices whose columns are summed over.

    Attributes:
        operand: rows and columns of a tile of inputs and gradients; None is all of them.
        weight: the same of weights.
        gradient: format of gradients; the other operands are in e4m3.
        powers: whether scales are powers of two.
    """

    operand: tuple[int | None, int | None]
    weight: tuple[int | None, int | None]
    gradient: torch.dtype = E4M3
    powers: bool = True

    def of(self, matrix: Tensor, format: torch.dtype = E4M3) -> Tensor:
        return rounded(matrix, format, self.operand, self.powers)

    def of_weight(self, matrix: Tensor) -> Tensor:
        return rounded(matrix, E4M3, self.weight, self.powers)


TILINGS = {
    "current": Tiling((None, None), (None, None), E5M2, powers=False),
    "row": Tiling((1, None), (1, None)),
    "block": Tiling((1, 128), (128, 128)),
    "mxfp8": Tiling((1, 32), (1, 32)),
}


class EmulatedFp8(Precision):
    """Blocks run as they are, their linears round.

    Args:
        scaling: one of TILINGS.
    """

    def __init__(self, scaling: str = "current", keep_blocks: int = 0):
        super().__init__(keep_blocks)
        self.tiling = TILINGS[scaling]

    def linear(self, in_features: int, out_features: int) -> nn.Module:
        return EmulatedFp8Linear(in_features, out_features, self.tiling)


class EmulatedFp8Linear(nn.Linear):
    """A linear whose three products take FP8 operands; its parameters are those of nn.Linear."""

    def __init__(self, in_features: int, out_features: int, tiling: Tiling = TILINGS["current"]):
        super().__init__(in_features, out_features)
        self.tiling = tiling

    def forward(self, x: Tensor) -> Tensor:
        return _Fp8Product.apply(x, self.weight, self.bias, self.tiling)


def rounded(matrix: Tensor, format: torch.dtype, tile: tuple[int | None, int | None], powers: bool) -> Tensor:
    """A matrix as FP8 holds it, in float32.

    Args:
        tile: rows and columns that share a scale; None is all of them. Those at the edges may be smaller.
        powers: take the largest power of two that is no larger than the scale.
    """
    rows, columns = matrix.shape
    height, width = min(tile[0] or rows, rows), min(tile[1] or columns, columns)
    padded = F.pad(matrix.float(), (0, -columns % width, 0, -rows % height))
    tiles = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))  # (down, height, across, width)
    largest = tiles.abs().amax((1, 3), keepdim=True)
    # Without a bound the scale of zeros, and of the tiniest magnitudes, would be infinite.
    scale = (torch.full_like(largest, torch.finfo(format).max) / largest).clamp(max=torch.finfo(torch.float32).max)
    if powers:
        scale = scale / (2 * torch.frexp(scale).mantissa)
    again = _from_fp8((tiles * scale).to(format)) / scale
    return again.flatten(2).flatten(0, 1)[:rows, :columns]


def _from_fp8(values: Tensor) -> Tensor:
    """In float32. By a table of all 256 values: torch's own cast of e4m3 takes six times as long on a CPU."""
    table = torch.arange(256, dtype=torch.uint8, device=values.device).view(values.dtype).float()
    return table.index_select(0, values.view(torch.uint8).flatten().int()).view(values.shape)


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, tiling: Tiling) -> Tensor:
        # Under ZeRO-3 the weight's numbers go after the forward pass and are back before the backward pass: a rounded
        # copy would outlive them, so the weight is rounded again.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.tiling = tiling
        y = F.linear(tiling.of(x.flatten(0, -2)), tiling.of_weight(weight), bias.float())
        return y.to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Gradients in float32, which autograd takes to the dtypes of x, weight and bias."""
        (x, weight), tiling, rows = ctx.saved_tensors, ctx.tiling, gradient.flatten(0, -2)
        gradient_x = gradient_weight = gradient_bias = None
        if ctx.needs_input_grad[0]:
            product = F.linear(tiling.of(rows, tiling.gradient), tiling.of_weight(weight.T))
            gradient_x = product.unflatten(0, gradient.shape[:-1])
        if ctx.needs_input_grad[1]:
            gradient_weight = F.linear(tiling.of(rows.T, tiling.gradient), tiling.of(x.flatten(0, -2).T))
        if ctx.needs_input_grad[2]:
            gradient_bias = rows.float().sum(0)
        return gradient_x, gradient_weight, gradient_bias, None
