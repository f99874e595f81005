"""Attention as torch's dispatcher sees it."""

from typing import Any


def is_attention(operator: Any) -> bool:
    """Whether an operator is an attention kernel of torch or flash-attn 2 or 3, forward or backward.

    FlexAttention and flash-attn 4 are no operators, but compiled where they are called.
    """
    namespace, _, name = operator.name().partition("::")
    return "flash_attn" in namespace or "attention" in name
