"""Time of a rank's Python: it launches what the GPU runs, beside it, and is the floor of many small passes."""

from collections.abc import Sequence

from afd_scale.config import RunConfig
from afd_scale.config.cast import NetworkConfig, Pass
from afd_scale.config.judges import VlmDiscriminatorConfig
from afd_scale.config.models import WanConfig
from afd_scale.config.sampler import SamplerConfig
from afd_scale.planning.flops import has_frozen_trunk
from afd_scale.planning.memory import has_twin, is_captured
from afd_scale.planning.vlm import shown_video, stacks
from afd_scale.planning.workload import Workload

# A block's forward pass, by itself and behind DeepSpeed's hooks. Assumed, from what a CPU shows: 0.4 ms of Python and
# dispatch in a narrow block (docs/measurements.md), 1.1 ms with the computing of one of width 128, 3 to 7 ms of that
# behind hooks (tests/unit/budgets/host_cost.py). A recomputation and a backward pass take about as much each.
BLOCK_SECONDS, HOOKED_SECONDS = 0.7e-3, 4e-3
GRAPH_SECONDS = 0.1e-3  # assumed: a whole captured pass, which is copies of its inputs and one launch
CAPTURE_PASSES = 2  # of a kind of pass, before its first replay: to warm up, and while it is captured


def host_seconds(config: RunConfig, load: Workload, passes: Sequence[Pass], gathered_rollout: bool) -> float:
    """Of a phase on one rank; of what does not run in every step, its share.

    Args:
        gathered_rollout: policies' passes without gradient run on whole weights, without hooks.
    """

    def of_pass(each: Pass) -> float:
        bare = has_twin(config, each, gathered_rollout)
        network = config.role(each.role).network
        block = BLOCK_SECONDS if bare else HOOKED_SECONDS
        if is_captured(config, load, each, gathered_rollout):
            launched, replayed = captured_passes(config.sampler, load.frames_of(each), each)
        else:
            launched, replayed = each.runs * _times_through(config, load, each, network), 0
        return (launched * _blocks(config, each, network) * block + replayed * GRAPH_SECONDS) / each.every

    return sum(map(of_pass, passes))


def captured_passes(sampler: SamplerConfig, frames: int, rollouts: Pass) -> tuple[int, int]:
    """Of all rollouts of a phase, which captures its passes anew: those that Python goes through, those replayed.

    The first pass of a rollout, which reads the text, runs as it is; another number of videos is another kind of pass.
    """
    launched = replayed = 0
    met: dict[tuple[int, ...], tuple[int, int]] = {}  # the rollout and chunk that met a kind of pass first
    captured = set()
    for run in range(rollouts.runs):
        is_last_and_smaller = run == rollouts.videos // rollouts.at_once
        for number, (chunk, *kind) in enumerate(sampler.order_of_calls(frames, rollouts.given)):
            key = (*kind, is_last_and_smaller)
            if number == 0 or met.setdefault(key, (run, chunk)) == (run, chunk):
                launched += 1
                continue
            launched += CAPTURE_PASSES * (key not in captured)
            captured.add(key)
            replayed += 1
    return launched, replayed


def _times_through(config: RunConfig, load: Workload, each: Pass, network: NetworkConfig) -> int:
    """How often a micro-batch runs through the blocks, forward or backward."""
    if each.kind == "rollout":
        return load.calls_of(each)
    clean_past = each.kind == "velocity" and not (each.gradient and each.context_gradient)
    times = 1 + clean_past
    if each.gradient and not (each.trains and has_frozen_trunk(network)):
        recomputes = isinstance(network, WanConfig | VlmDiscriminatorConfig) and network.activation_checkpointing
        times += 1 if recomputes in (False, "none") else 2
    return times


def _blocks(config: RunConfig, each: Pass, network: NetworkConfig) -> int:
    if isinstance(network, WanConfig):
        return network.layers_run
    if isinstance(network, VlmDiscriminatorConfig):
        return sum(stack.layers for stack in stacks(network, shown_video(config, each.frames)))
    return 0  # few layers
