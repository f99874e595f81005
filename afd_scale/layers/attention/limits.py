"""What an attention backend's kernels take, so that a run hears of a mismatch when it is built."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from afd_scale.layers.attention.layout import AttentionLayout

Attend = Callable[[Tensor, Tensor, Tensor, AttentionLayout], Tensor]

Capability = tuple[int, int]  # of a GPU: major, minor
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Limits:
    """Of one kind of device, forward and backward.

    Attributes:
        dtypes: of q, k and v.
        head_multiple, min_head_dim, max_head_dim: of the head width.
        capabilities: first and last major compute capability of a GPU; None where there is no such thing.
    """

    dtypes: tuple[torch.dtype, ...]
    head_multiple: int = 1
    min_head_dim: int = 1
    max_head_dim: int | None = None
    capabilities: tuple[int, int] | None = None

    def refusal(self, dtype: torch.dtype, head_dim: int, capability: Capability | None) -> str | None:
        """Why it cannot work on a device of this compute capability ("needs ..."), or None."""
        if dtype not in self.dtypes:
            names = " or ".join(_name(d) for d in self.dtypes)
            return f"needs {names} here, not {_name(dtype)}"
        too_wide = self.max_head_dim is not None and head_dim > self.max_head_dim
        if head_dim % self.head_multiple or head_dim < self.min_head_dim or too_wide:
            most = "" if self.max_head_dim is None else f" to {self.max_head_dim}"
            return (
                f"needs a head width of {max(self.min_head_dim, self.head_multiple)}{most}"
                f" in steps of {self.head_multiple}, not {head_dim}"
            )
        if self.capabilities is not None:
            first, last = self.capabilities
            assert capability is not None
            major, minor = capability
            if not first <= major <= last:
                span = (
                    f"{first}.x" if first == last else f"{first}.0 or later" if last == 99 else f"{first}.x to {last}.x"
                )
                return f"needs a GPU of compute capability {span}, not {major}.{minor}"
        return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
