"""The learning rate of a step."""

import math

from afd_scale.config.models import OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """Linear warm-up to the peak, then constant, or a half cosine that would reach zero one step after `steps`.

    Args:
        step: counts from 1.
    """
    warmup = optimizer.warmup_steps
    if step <= warmup:
        return optimizer.learning_rate * step / warmup
    if optimizer.schedule == "constant":
        return optimizer.learning_rate
    progress = (step - warmup - 1) / max(steps - warmup, 1)
    return optimizer.learning_rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
