"""Block-causal attention: one layout object, and the kernels that compute it exactly."""

from afd_scale.layers.attention.layout import AttentionLayout
from afd_scale.layers.attention.sdpa import attend, attend_all

__all__ = ["AttentionLayout", "attend", "attend_all"]
