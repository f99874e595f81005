"""In which precision a block's products are computed: its linears, and how it is run."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from afd_scale.layers.attention.operators import is_attention

Recompute = Literal["full", "keep_attention", "none"]


class Precision:
    """What makes the linears of a block (q, k, v, o, feed-forward) and runs it; here in the parameters' own dtype.

    Args:
        keep_blocks: first and last blocks of a network, so many each, whose linears stay in the parameters' own dtype.
    """

    def __init__(self, keep_blocks: int = 0):
        self.keep_blocks = keep_blocks

    def of_block(self, index: int, num_blocks: int) -> "Precision":
        """Of one block of a network: itself, or plain where the block is kept."""
        kept = min(index, num_blocks - 1 - index) < self.keep_blocks
        return Precision() if kept else self

    def linear(self, in_features: int, out_features: int) -> nn.Module:
        """A linear layer with bias whose parameters are named `weight` and `bias`."""
        return nn.Linear(in_features, out_features)

    def run_block(self, block: Callable[..., Any], *arguments: Any, recompute: Recompute) -> Any:
        """A transformer block; `recompute` is what of it the backward pass does again, as the config says."""
        if recompute == "none" or not torch.is_grad_enabled():
            return block(*arguments)
        contexts: dict[str, Any] = {} if recompute == "full" else {"context_fn": _keeping_attention}
        # ZeRO-3 empties a parameter between forward and recomputation, which the metadata check takes for an error.
        # Recomputation stops early, at the last tensor that is needed (torch's default): a block that runs to its end
        # releases its parameters in the middle of its backward pass, which then fails (DeepSpeed 0.19).
        return checkpoint(block, *arguments, use_reentrant=False, determinism_check="none", **contexts)


def _policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_attention(operator) else CheckpointPolicy.PREFER_RECOMPUTE


_keeping_attention = partial(create_selective_checkpoint_contexts, _policy)
