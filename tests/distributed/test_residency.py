"""Weights gathered once a rollout against once a pass: how many bytes move, what is left behind, the same videos.

Run as a script by torchrun this file is one rank; as a test it starts them.
"""

import os
from collections import Counter
from functools import partial
from typing import Any

import torch

from tests.distributed.processes import leave, on_ranks

CHUNKS, STEPS = 7, 4  # 7 chunks of 4 denoising steps, the first of them with the clean pass of the chunk before
SHAPE = {"dim": 32, "ffn_dim": 40, "num_heads": 2, "num_layers": 3, "freq_dim": 8, "text_dim": 6, "text_length": 5,
         "latent_channels": 3, "prediction": "velocity"}  # fmt: skip


def check_rollouts() -> None:
    """Every rank: the same rollout with either residency, of a copy and of an adapter."""
    from afd_scale.benchmarks.networks import random_batch
    from afd_scale.config import RunConfig
    from afd_scale.engines.shards import Residency, whole_bytes
    from afd_scale.layers.lora import adapter_of
    from afd_scale.parallel.launchers import launched_as
    from afd_scale.parallel.ranks import start_ranks
    from afd_scale.rollout.sampler import Noise, Sampler
    from afd_scale.training.build import build_run

    draw = torch.Generator().manual_seed(0)
    text, noise = torch.randn(2, 5, 6, generator=draw), torch.randn(2, CHUNKS, 3, 4, 4, generator=draw)
    drawn = Noise(noise, torch.randn(STEPS - 1, *noise.shape, generator=draw))
    with start_ranks(launched_as(os.environ), timeout_minutes=2) as ranks:
        for lora in (None, {"rank": 2}):
            config = RunConfig.model_validate({
                "student": {**SHAPE, "lora": lora}, "evaluation": {"metrics": "none"},
                "data": {"latent_frames": CHUNKS, "global_batch": 2},
                "method": {"name": "afd", "discriminator": {"name": "latent", **SHAPE}},
            })  # fmt: skip
            run = build_run(config, ranks)
            policy: Any = run.engines["old_policy"]
            for parameter in policy.network.parameters():  # an untrained student predicts nothing
                parameter.ds_tensor.normal_(0, 0.2)
            every = list(policy.network.parameters())
            own = [p for name, p in policy.network.named_parameters() if adapter_of(name) in (None, policy.adapter)]
            moved, videos, hooked = {}, {}, Counter()
            for choice in ("sharded", "gathered", "merged"):
                policy.residency = Residency("sharded" if choice == "sharded" else "gathered", 0, 2, ranks.any)
                before = run.counter.bytes
                hook = policy.network.register_forward_pre_hook(partial(note, hooked, choice))
                with policy.resident(sampling=choice == "merged"):
                    videos[choice] = Sampler(config.sampler).rollout(policy, text, drawn)
                hook.remove()
                moved[choice] = run.counter.bytes - before
                assert all(p.data.numel() == 0 for p in policy.network.parameters()), "whole copies are left behind"
            for choice in ("gathered", "merged"):
                torch.testing.assert_close(videos["sharded"], videos[choice], rtol=1e-4, atol=1e-4)
                assert moved[choice] == whole_bytes(own), "each weight moves once"
            passes = CHUNKS * STEPS
            assert hooked == {"sharded": passes}, "whole weights run in a network without hooks"
            # One small weight is sometimes still there from the pass before.
            assert moved["sharded"] > 0.99 * passes * whole_bytes(every)
            assert 20 * moved["gathered"] <= moved["sharded"], moved

            run.method.train_step(random_batch(config, 1, ranks.device), 1)
            for network in run.engines.values():
                assert all(p.data.numel() == 0 for p in network.network.parameters()), "a phase leaves whole copies"

            automatic = Residency("auto", 0, 2, ranks.any)
            assert automatic.gathers(own)
            # It must fit on every rank: here it does on one of them.
            crowded = Residency("auto", 2**60 if ranks.rank == 1 else 0, 2, ranks.any)
            assert not crowded.gathers(own)


def note(counts: Counter[str], choice: str, *_: Any) -> None:
    """A hook on a module's calls."""
    counts[choice] += 1


def test_gathered_weights_move_once_a_rollout() -> None:
    result = on_ranks(2, __file__)
    assert result.returncode == 0, result.stderr[-3000:]


if __name__ == "__main__":
    check_rollouts()
    leave()
