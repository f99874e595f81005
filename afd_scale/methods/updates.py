"""What the steps of all methods have in common: passes in pieces, with gradient or without; learning rates."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from afd_scale.config.models import OptimizerConfig
from afd_scale.protocols import Engine, Metrics, Trained
from afd_scale.types import pieces


@torch.no_grad()
def without_gradient(
    engine: Engine, rows: int, run: Callable[[slice], Tensor], *, sampling: bool = False
) -> Tensor:  # fmt: skip
    """A resident phase of an engine: `run` on one micro-batch of rows after another; their results as one."""
    with engine.resident(sampling):
        return torch.cat([run(part) for part in watched_pieces(engine, rows, engine.micro_batch)])


def watched_pieces(engine: Engine, rows: int, at_once: int | None) -> Iterator[slice]:
    """Rows in slices of at most `at_once`, before each of which the step may be given up."""
    for part in pieces(rows, at_once):
        engine.watch.between()
        yield part


def accumulate(
    trained: Trained, rows: int, at_once: int | None, loss_of: Callable[[slice], tuple[Tensor, Metrics]]
) -> Metrics:
    """Backward of one piece of the rows after another, weighted by its share: together the gradient of the whole.

    Args:
        at_once: rows of a piece; None is all. The same on all ranks, which hold equal shares.
        loss_of: the mean loss of some rows, and metrics that are means over them.
    Returns:
        The metrics of all rows.
    """
    total: dict[str, Tensor] = {}
    for part in watched_pieces(trained, rows, at_once):
        loss, metrics = loss_of(part)
        share = (part.stop - part.start) / rows
        trained.backward(loss * share)
        for name, value in metrics.items():
            total[name] = total.get(name, 0) + share * value
    return total


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
