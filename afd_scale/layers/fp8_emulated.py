"""FP8 linears by rounding, on any device: a stand-in for the numbers of FP8 training, at none of its speed.

    y  = q(x) q(W)^T + b        x and W in e4m3
    dx = q(g) q(W)              g, the gradient of y, in e5m2, whose range is wider
    dW = q(g)^T q(x)
    db = sum of g               not rounded

q scales a tensor so that its largest magnitude becomes the format's largest number ("current" scaling, one scale a
tensor: the maximum is that of the rows of one rank) and rounds to the nearest. Products of rounded values are summed in
float32 and leave rounded once, to the dtype of x: what tensor cores do, and Transformer Engine's Float8CurrentScaling.

Source: FP8 Formats for Deep Learning, arXiv:2209.05433.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from afd_scale.layers.precision import Precision

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2


class EmulatedFp8(Precision):
    """Blocks run as they are, their linears round."""

    def linear(self, in_features: int, out_features: int) -> nn.Module:
        return EmulatedFp8Linear(in_features, out_features)


class EmulatedFp8Linear(nn.Linear):
    """A linear whose three products take FP8 operands; its parameters are those of nn.Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return _Fp8Product.apply(x, self.weight, self.bias)


def quantise(x: Tensor, format: torch.dtype) -> tuple[Tensor, Tensor]:
    """The FP8 values of a tensor and the float32 number to multiply them by."""
    x = x.float()
    # Without a bound the scale of zeros, and of the tiniest magnitudes, would be infinite.
    scale = (torch.finfo(format).max / x.abs().amax()).clamp(max=torch.finfo(torch.float32).max)
    return (x * scale).to(format), 1 / scale


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        (x8, x_unit), (weight8, weight_unit) = quantise(x, FORWARD), quantise(weight, FORWARD)
        # Under ZeRO-3 the weight's numbers go after the forward pass and are back before the backward pass: a rounded
        # copy would outlive them, so the weight is rounded again.
        ctx.save_for_backward(x8 if ctx.needs_input_grad[1] else None, x_unit, weight)
        return (F.linear(x8.float(), weight8.float()) * (x_unit * weight_unit) + bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients in float32, which autograd takes to the dtypes of x, weight and bias."""
        x8, x_unit, weight = ctx.saved_tensors
        gradient8, unit = quantise(gradient, BACKWARD)
        gradient_x = gradient_weight = gradient_bias = None
        if ctx.needs_input_grad[0]:
            weight8, weight_unit = quantise(weight, FORWARD)
            gradient_x = gradient8.float() @ weight8.float() * (unit * weight_unit)
        if ctx.needs_input_grad[1]:
            gradient_rows, x_rows = gradient8.float().flatten(0, -2), x8.float().flatten(0, -2)
            gradient_weight = gradient_rows.T @ x_rows * (unit * x_unit)
        if ctx.needs_input_grad[2]:
            gradient_bias = gradient.float().flatten(0, -2).sum(0)
        return gradient_x, gradient_weight, gradient_bias
