"""What a run has computed by a step: a function of the step alone, so that a resumed run goes on counting."""

from dataclasses import dataclass

from afd_scale.config import RunConfig
from afd_scale.config.judges import JudgeConfig
from afd_scale.planning.flops import pass_flops
from afd_scale.planning.workload import workload

PFLOP = 1e15


@dataclass(frozen=True)
class _Cost:
    """Of one pass.

    Attributes:
        flops: over all ranks, each time that it runs.
        every: it runs in every so many steps.
        warm_up: steps of the warm-up in which it runs, the last ones.
    """

    flops: float
    every: int
    warm_up: int

    def by(self, step: int) -> float:
        if step < 1:  # those of the warm-up end with 0
            times = max(self.warm_up + step, 0)
        else:
            times = self.warm_up + step // self.every
        return times * self.flops


class Spent:
    """The compute of a run's training steps by the planner's count; samples, diagnostics and evaluation are not in it.

    Args:
        ranks: of the run.
        warm_up_steps: of its method, before step 1.
    """

    def __init__(self, config: RunConfig, ranks: int, warm_up_steps: int):
        load = workload(config, ranks)
        self._costs = []
        for each in load.passes:
            network = config.role(each.role).network
            own = warm_up_steps
            if isinstance(network, JudgeConfig) and each.trains:  # of several judges each begins with its own
                own = min(own, network.warmup_steps)
            total = ranks * pass_flops(config, load, each).total
            self._costs.append(_Cost(total, each.every, own if each.warm_up else 0))

    def pflop(self, step: int) -> float:
        """Over all ranks, that step and the warm-up included."""
        return sum(cost.by(step) for cost in self._costs) / PFLOP
