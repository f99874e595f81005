"""A tiny random Qwen2-VL with a home-made tokenizer, as the model that judges clips."""

from afd_scale.rehearsal.tiny_models import save_vlm as save_tiny_judge

__all__ = ["save_tiny_judge"]
