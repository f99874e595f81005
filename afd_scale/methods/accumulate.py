"""Gradient accumulation: a batch goes through a network in pieces, and its gradient is that of the whole."""

from collections.abc import Callable

from torch import Tensor

from afd_scale.protocols import Metrics, Trained


def pieces(rows: int, at_once: int | None) -> list[slice]:
    """Rows 0 .. rows in slices of at most `at_once`; the same on all ranks, which hold equal shares."""
    at_once = at_once or rows
    return [slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once)]


def accumulate(trained: Trained, parts: list[slice], loss_of: Callable[[slice], tuple[Tensor, Metrics]]) -> Metrics:
    """Backward of each part, weighted by its share of the rows.

    Args:
        loss_of: the mean loss of some rows, and metrics that are means over them.
    Returns:
        The metrics of all rows.
    """
    rows = parts[-1].stop
    total: dict[str, Tensor] = {}
    for part in parts:
        loss, metrics = loss_of(part)
        share = (part.stop - part.start) / rows
        trained.backward(loss * share)
        for name, value in metrics.items():
            total[name] = total.get(name, 0) + share * value
    return total
