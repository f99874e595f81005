"""A rank of a real run against its plan: what it holds all the time, counted over every tensor alive after a step, and
what it gathers in a step, with nothing kept whole for reuse.

Run as a script by torchrun this file is one rank; as a test it starts them.
"""

import gc
import os
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.processes import leave, on_ranks

CONFIGS = Path(__file__).parents[2] / "configs" / "wan_1_3b"
SHAPE = {"dim": 128, "ffn_dim": 512, "num_heads": 4, "num_layers": 4, "text_dim": 32, "text_length": 16, "freq_dim": 32}
SMALL = (
    "student.weights=null", "parallel.sequence=1", "data.global_batch=2",
    "data.latent_frames=3", "data.latent_height=8", "data.latent_width=8", "method.rollouts_per_prompt=2",
    "engine.deepspeed={zero_optimization: {reduce_bucket_size: 100000, stage3_max_live_parameters: 0, "
    "stage3_max_reuse_distance: 0, stage3_prefetch_bucket_size: 0}}",
)  # fmt: skip


def check(name: str, *overrides: str) -> None:
    """Every rank: build a run, train a step, count."""
    from afd_scale.benchmarks.networks import random_batch
    from afd_scale.config import load_config
    from afd_scale.parallel.launchers import launched_as
    from afd_scale.parallel.ranks import start_ranks
    from afd_scale.planning.communication import step_traffic
    from afd_scale.planning.memory import rank_memory
    from afd_scale.planning.parameters import network_sizes
    from afd_scale.planning.workload import workload
    from afd_scale.training.build import build_run

    networks = (
        "student",
        *(("method.fake_score", "method.real_score") if "dmd" in name else ("method.discriminator",)),
    )
    shapes = [f"{network}.{field}={size}" for network in networks for field, size in SHAPE.items()]
    shapes += [f"{network}.weights=null" for network in networks]
    config = load_config(CONFIGS / name, (*SMALL, *shapes, *overrides))
    with start_ranks(launched_as(os.environ), timeout_minutes=2) as ranks:
        before = held_bytes()
        run = build_run(config, ranks)
        built = run.counter.bytes
        run.method.train_step(random_batch(config, 1, ranks.device), 1)
        gathered = run.counter.bytes - built
        for network in run.networks.values():
            network.release()
        load, sizes = workload(config, ranks.size), network_sizes(config)
        planned = sum(rank_memory(config, load, sizes, usable_bytes=0).shards.values())
        measured = held_bytes() - before
        traffic = step_traffic(config, load, sizes, gathered_rollout=config.rollout.weights == "gathered")
        # The plan counts what comes from the other ranks, the counter whole weights.
        whole = sum(phase.gather for phase in traffic.values()) * ranks.size / (ranks.size - 1)
    assert abs(planned / measured - 1) < 0.01, f"planned {planned}, measured {measured}"
    assert abs(whole / gathered - 1) < 0.05, f"planned to gather {whole}, gathered {gathered}"


def held_bytes() -> int:
    """Of all tensors alive in this process."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("self_forcing_full.yaml", ["precision=fp32", "rollout.weights=sharded"]),
        ("self_forcing_full.yaml", ["precision=bf16", "rollout.weights=sharded"]),
        ("self_forcing.yaml", ["precision=bf16", "train.micro_batch=null", "rollout.weights=gathered"]),
        # One denoising step: a random exit would end rollouts earlier than planned.
        ("paper_gan.yaml", ["method.student_every=1", "rollout.weights=sharded", "sampler.timesteps=[1000]"]),
        ("paper_dmd.yaml", ["method.student_every=1", "rollout.weights=sharded", "sampler.timesteps=[1000]"]),
    ],
    ids=["fp32", "bf16", "lora", "gan", "dmd"],
)
def test_shards_and_gathers_are_as_planned(name, overrides):
    done = on_ranks(2, __file__, name, *overrides)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    check(*sys.argv[1:])
    leave()
