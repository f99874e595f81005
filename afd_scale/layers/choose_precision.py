"""From a run's `precision` to what makes its linears."""

import logging

import torch

from afd_scale.layers.fp8_emulated import TILINGS, EmulatedFp8
from afd_scale.layers.precision import Precision
from afd_scale.layers.transformer_engine import TransformerEngineFp8

log = logging.getLogger(__name__)


def choose_precision(name: str, scaling: str, device: torch.device, *, keep_blocks: int = 0) -> Precision:
    """Transformer Engine's FP8 on a GPU, an emulated one on a CPU; for another precision plain linears.

    Args:
        name: fp32, bf16 or fp8.
        scaling: `fp8_scaling` of a run.
        keep_blocks: first and last blocks, so many each, that FP8 leaves alone.
    Raises:
        ValueError: FP8 cannot be had here as asked for.
    """
    if name != "fp8":
        return Precision()
    if device.type == "cuda":
        precision = TransformerEngineFp8(scaling, keep_blocks)
        log.info("precision fp8: Transformer Engine, %s scaling", scaling)
        return precision
    if scaling not in TILINGS:
        raise ValueError(f"fp8_scaling ({scaling}) must be one of {', '.join(TILINGS)} on a CPU: emulated FP8 keeps no "
                         "history of maxima and has no values of 4 bits")  # fmt: skip
    log.info("precision fp8: emulated FP8, a numerical stand-in, no faster; %s scaling", scaling)
    return EmulatedFp8(scaling, keep_blocks)


def parameter_dtype(name: str) -> torch.dtype:
    """Of a precision's parameters and activations."""
    return torch.float32 if name == "fp32" else torch.bfloat16
