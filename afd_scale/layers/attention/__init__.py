"""Block-causal attention: one layout object, and the kernels that compute it exactly."""

from afd_scale.layers.attention.backends import Backend, choose_backend
from afd_scale.layers.attention.layout import AttentionLayout
from afd_scale.layers.attention.sdpa import attend, attend_all

__all__ = ["AttentionLayout", "Backend", "attend", "attend_all", "choose_backend"]
