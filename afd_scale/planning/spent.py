"""What a run has computed by a step: a function of the step alone, so that a resumed run goes on counting."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from afd_scale.config import RunConfig
from afd_scale.config.cast import Pass
from afd_scale.config.judges import JudgeConfig
from afd_scale.config.methods import AfdConfig
from afd_scale.planning.flops import pass_flops
from afd_scale.planning.workload import Workload, workload

PFLOP = 1e15


@dataclass(frozen=True)
class _Cost:
    """Of one pass.

    Attributes:
        flops: over all ranks, each time that it runs.
        every: it runs in every so many steps.
        last: step behind which it runs no more.
        warm_up: steps of the warm-up in which it runs, the last ones.
    """

    flops: float
    every: int
    last: int | None
    warm_up: int

    def by(self, step: int) -> float:
        if step < 1:  # those of the warm-up end with 0
            times = max(self.warm_up + step, 0)
        else:
            until = step if self.last is None else min(step, self.last)
            times = self.warm_up + until // self.every
        return times * self.flops


@dataclass(frozen=True)
class _CostOfDrawn:
    """Of a pass over videos whose length is drawn for each step: by expectation.

    Attributes:
        flops: of a step, over all ranks.
        warm_up: as above.
    """

    flops: Callable[[int], float]
    warm_up: int

    def by(self, step: int) -> float:
        return sum(map(self.flops, range(1 - self.warm_up, step + 1)))


class Spent:
    """The compute of a run's training steps by the planner's count; samples, diagnostics and evaluation are not in it.

    Rollouts whose lengths are drawn count as long as they are on average, step by step.

    Args:
        ranks: of the run.
        warm_up_steps: of its method, before step 1.
    """

    def __init__(self, config: RunConfig, ranks: int, warm_up_steps: int):
        load = workload(config, ranks)
        self._costs: list[_Cost | _CostOfDrawn] = []
        for each in load.passes:
            network = config.role(each.role).network
            own = warm_up_steps
            if isinstance(network, JudgeConfig) and each.trains:  # of several judges each begins with its own
                own = min(own, network.warmup_steps)
            in_warm_up = own if each.warm_up else 0
            if each.kind == "rollout" and (flops := _of_drawn(config, load, each, ranks)) is not None:
                self._costs.append(_CostOfDrawn(flops, in_warm_up))
            else:
                total = ranks * pass_flops(config, load, each).total
                self._costs.append(_Cost(total, each.every, each.last, in_warm_up))

    def pflop(self, step: int) -> float:
        """Over all ranks, that step and the warm-up included."""
        return sum(cost.by(step) for cost in self._costs) / PFLOP


def _of_drawn(config: RunConfig, load: Workload, rollout: Pass, ranks: int) -> Callable[[int], float] | None:
    """The mean cost of a step's rollouts, by step; None where all are of one length."""
    method = config.method
    if not isinstance(method, AfdConfig) or method.long_rollouts is None:
        return None
    lengths, least = method.long_rollouts.lengths, method.judged_frames or config.data.latent_frames

    @cache
    def of_length(frames: int) -> float:
        return ranks * pass_flops(config, load, replace(rollout, frames=frames)).total

    @cache
    def mean(drawn_from: range) -> float:
        return sum(map(of_length, drawn_from)) / len(drawn_from)

    return lambda step: mean(lengths(step, load.chunk_frames, least))
