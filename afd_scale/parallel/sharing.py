"""Videos of a sequence's ranks, shared among them by who judges each video as a whole."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from afd_scale.types import Videos


def share_videos(
    videos: Videos, judge: Callable[[Videos], Tensor], group: dist.ProcessGroup, *, spare: Sequence[int] = (0,)
) -> Tensor:
    """(B,) logits of videos that all ranks of a group hold; each rank judges its part of them.

    A video's number says whose it is, so that in every pass it is with the rank that has decoded it already.

    Args:
        spare: what a rank without a video judges, and nobody asks for: all run the same collectives within.

    The gradient is for an engine that averages over all ranks, the loss being the same on those of the group.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    rows_of: list[list[int]] = [[] for _ in range(size)]
    for row, number in enumerate(videos.numbers or range(len(videos))):
        rows_of[number % size].append(row)
    most = max(map(len, rows_of))
    own = judge(videos.take(rows_of[rank] or spare))
    padded = F.pad(own[: max(most, 1)], (0, max(0, max(most, 1) - len(own))))
    gathered: Tensor = _Gathered.apply(padded, group)
    places = {row: holder * most + place for holder, rows in enumerate(rows_of) for place, row in enumerate(rows)}
    return gathered[[places[row] for row in range(len(videos))]]


class _Gathered(torch.autograd.Function):
    """From (n,) of each rank to (ranks n,) of all."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        size, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        return gradient.chunk(size)[rank] * size, None
