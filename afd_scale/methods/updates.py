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
    engine: Engine, rows: int, run: Callable[[slice], Tensor], *, sampling: bool = False, group: int | None = None
) -> Tensor:  # fmt: skip
    """A resident phase of an engine: `run` on one micro-batch of rows after another; their results as one."""
    with engine.resident(sampling):
        return torch.cat([run(part) for part in watched_pieces(engine, rows, engine.micro_batch, group)])


def watched_pieces(engine: Engine, rows: int, at_once: int | None, group: int | None = None) -> Iterator[slice]:
    """Rows in slices as of `pieces`, before each of which the step may be given up."""
    for part in pieces(rows, at_once, group):
        engine.watch.between()
        yield part


def accumulate(
    trained: Trained, rows: int, at_once: int | None, loss_of: Callable[[slice], tuple[Tensor, Metrics]],
    group: int | None = None,
) -> Metrics:  # fmt: skip
    """Backward of one piece of the rows after another, weighted by its share: together the gradient of the whole.

    Args:
        at_once: rows of a piece; None is all. The same on all ranks, which hold equal shares.
        group: rows that stand together, and with no others in a piece; None is all.
        loss_of: the mean loss of some rows, and metrics that are means over them.
    Returns:
        The metrics of all rows.
    """
    total: dict[str, Tensor] = {}
    for part in watched_pieces(trained, rows, at_once, group):
        loss, metrics = loss_of(part)
        share = (part.stop - part.start) / rows
        trained.backward(loss * share)
        for name, value in metrics.items():
            total[name] = total.get(name, 0) + share * value
    return total


def steered(factor: Tensor, target: float, measured: Tensor) -> Tensor:
    """The factor of the next learning rate: grown or shrunk by at most a quarter, so that what is measured, a distance
    that grows with the rate, comes near its target; within [0.1, 10]."""
    return (factor * (target / measured).sqrt().clamp(0.8, 1.25)).clamp(0.1, 10)


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
