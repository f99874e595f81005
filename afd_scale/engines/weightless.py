"""The engine of a judge that has no weights here, such as one behind HTTP."""

import contextlib
from contextlib import AbstractContextManager

from torch import Tensor

from afd_scale.layers.network import Network
from afd_scale.parallel.ranks import Ranks
from afd_scale.parallel.sharing import share_videos
from afd_scale.protocols import Unwatched, Watch
from afd_scale.types import Videos


class WeightlessNetwork:
    """A network without parameters. Where it fails on one rank, all raise that, and none waits for another."""

    watch: Watch = Unwatched()

    def __init__(self, network: Network, ranks: Ranks, micro_batch: int | None):
        self.network, self.ranks, self.micro_batch = network, ranks, micro_batch

    def __call__(self, videos: Videos) -> Tensor:
        group = self.ranks.sequence_group
        return self._judge(videos) if group is None else share_videos(videos, self._judge, group, spare=())

    def resident(self, sampling: bool = False) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _judge(self, videos: Videos) -> Tensor:
        logits: list[Tensor] = []  # not what `run_on_all` is given back, which other ranks would be sent
        self.ranks.run_on_all(lambda: logits.append(self.network(videos)))
        return logits[0]
