"""What a model takes from outside: its linears, its attention, how a block is run, and which tokens are here.

A model never knows which it was given: `precision` makes linears and runs blocks, `attend` is a kernel, `adapters` put
small trained weights beside frozen ones, and a subclass in `afd_scale.parallel` shares the tokens among ranks.
"""

from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

from torch import Tensor, nn

from afd_scale.layers.attention import AttentionLayout, attend
from afd_scale.layers.kv_cache import Past
from afd_scale.layers.lora import Adapters
from afd_scale.layers.precision import Precision, Recompute
from afd_scale.layers.rope import Rotation, WindowRotation

Attend = Callable[[Tensor, Tensor, Tensor, AttentionLayout], Tensor]
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


class ModelOps:
    """All tokens on one device.

    Args:
        precision: of the blocks' linears.
        attend: (q, k, v, layout) to the output, (B, L, N, D) each.
        adapters: what every linear of a block gets beside its weight.
        compile: makes a function of tensors a faster one; None leaves it.
    """

    def __init__(
        self, precision: Precision | None = None, attend: Attend = attend, adapters: Adapters | None = None,
        compile: Compile | None = None,
    ):  # fmt: skip
        self.precision, self.attend, self.adapters = precision or Precision(), attend, adapters
        self.compile = compile

    def of_blocks(self, num_blocks: int) -> Iterator["ModelOps"]:
        """For each block of a network, first to last: `precision` may leave the linears of some alone."""
        for index in range(num_blocks):
            ops = copy(self)
            ops.precision = self.precision.of_block(index, num_blocks)
            yield ops

    def linear(self, in_features: int, out_features: int) -> nn.Module:
        """A linear layer with bias: q, k, v, o and feed-forward of a block."""
        linear = self.precision.linear(in_features, out_features)
        if self.adapters is not None:
            self.adapters.attach(linear, in_features, out_features)
        return linear

    def split_tokens(self, x_BLE: Tensor, frames: int) -> Tensor:
        """The tokens that this rank works on; as many of every latent frame."""
        return x_BLE

    def gather_tokens(self, x_BLE: Tensor, frames: int, tokens_per_frame: int) -> Tensor:
        """All tokens again, on every rank: the inverse of `split_tokens`."""
        return x_BLE

    def attention(
        self, q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor,
        rotation: Rotation | WindowRotation, layout: AttentionLayout, past: Past | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Self-attention of the current tokens over the past and themselves.

        Args:
            q_BLND, k_BLND, v_BLND: of this rank's tokens, before RoPE.
            rotation, layout: of all tokens.
        Returns:
            The output (B, L, N, D), and the current keys and values as a later pass may see them.
        """
        if isinstance(rotation, WindowRotation):  # the past keeps keys as they are
            assert past is not None, "a window is of a cache"
            keys, values = past.extend(k_BLND, v_BLND)
            q_BLND, keys = rotation(q_BLND, keys)
            return self.attend(q_BLND, keys, values, layout), k_BLND, v_BLND
        q_BLND, k_BLND = rotation(q_BLND, k_BLND, None if past is None else past.room(k_BLND))
        keys, values = (k_BLND, v_BLND) if past is None else past.extend(k_BLND, v_BLND)
        return self.attend(q_BLND, keys, values, layout), k_BLND, v_BLND

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of tensors that the networks call often, compiled where that was asked for."""
        return self.compile(function) if self.compile else function

    def run_block(self, block: Callable[..., Any], *arguments: Any, recompute: Recompute) -> Any:
        """A transformer block, its activations stored or recomputed in the backward pass."""
        return self.precision.run_block(block, *arguments, recompute=recompute)
