"""What a model takes from outside: its linears, its attention, and how a block is run.

These are the plain operations of one device. `afd_scale.parallel` and precision layers subclass them; a model never
knows which it was given.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from afd_scale.layers.attention import AttentionLayout, attend
from afd_scale.layers.kv_cache import Past


class ModelOps:
    """Plain torch on one device."""

    def linear(self, in_features: int, out_features: int) -> nn.Module:
        """A linear layer with bias: q, k, v, o and feed-forward of a block."""
        return nn.Linear(in_features, out_features)

    def attention(
        self, q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor, layout: AttentionLayout, past: Past | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Self-attention of the current tokens over the past and themselves.

        Returns:
            The output (B, L, N, D), and the current keys and values as a later pass may see them.
        """
        keys, values = (k_BLND, v_BLND) if past is None else past.extend(k_BLND, v_BLND)
        return attend(q_BLND, keys, values, layout), k_BLND, v_BLND

    def run_block(self, block: Callable[..., Any], *arguments: Any, recompute: bool) -> Any:
        """A transformer block, its activations stored or recomputed in the backward pass."""
        if not (recompute and torch.is_grad_enabled()):
            return block(*arguments)
        # ZeRO-3 empties a parameter between forward and recomputation, which the metadata check takes for an error.
        return checkpoint(block, *arguments, use_reentrant=False, determinism_check="none")
