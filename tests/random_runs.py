"""Runs with random weights, as training would leave them: no training, no data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from afd_scale.checkpoint.run_state import RunCheckpoints, SavedStudent
from afd_scale.config import RunConfig, resolved_yaml
from afd_scale.config.models import PolicyConfig
from afd_scale.engines.cast import build_cast
from afd_scale.engines.plain import Plain
from afd_scale.engines.resharding import Shards, snapshot
from afd_scale.parallel.ranks import alone

STUDENT = {"architecture": "toy", "dim": 16, "ffn_dim": 24, "num_heads": 2, "num_layers": 1, "weights": None}
WORLDS = {"kick": ("kick", 6), "drop": ("toy", 4)}  # suite, and latent frames of a clip


class Saved:
    """A network's weights, as one rank saves them of one that is trained."""

    def __init__(self, network: Any):
        self.network = network

    def snapshot(self, folder: Path) -> Shards:
        weights = ((f"weight/{name}", parameter) for name, parameter in self.network.named_parameters())
        return snapshot(weights, optimizer_steps=0.0, nvme=False)

    def load(self, folder: Path) -> None:
        raise AssertionError("these are written only")


def write_random_run(
    folder: Path, world: str = "kick", steps: Sequence[int] = (2,), prompts: str = "all", seed: int = 1, **method: Any
) -> tuple[RunConfig, dict[str, Any]]:
    """A run of AFD with a small student and judge, other weights at each step.

    Returns:
        Its config, and the engines as of the last step.
    """
    suite, frames = WORLDS[world]
    config = RunConfig.model_validate({
        "name": folder.name, "out": folder.parent, "student": STUDENT, "sampler": {"timesteps": [1000]},
        "method": {"name": "afd", "prior_weight": 0.0, "discriminator": {"name": "conv", "channels": 4}, **method},
        "data": {"latent_frames": frames, "source": {"world": world, "prompts": prompts}},
        "train": {"steps": max(steps), "keep_checkpoints": 10, "trackers": []}, "evaluation": {"metrics": suite},
    })  # fmt: skip
    engines = build_cast(config, Plain(config, torch.device("cpu")))
    checkpoints, generator = RunCheckpoints(config, alone()), torch.Generator().manual_seed(seed)
    policy = PolicyConfig(student=config.student, sampler=config.sampler)
    for step in steps:
        for engine in engines.values():
            for parameter in engine.network.parameters():
                parameter.data.normal_(0, 0.2, generator=generator)
        networks = {role.name: Saved(engines[role.name].network) for role in config.cast if role.changes}
        checkpoints.save(step, networks, {}, SavedStudent(policy, config.method.exported))
        checkpoints.finish()
    (folder / "config.yaml").write_text(resolved_yaml(config))
    return config, engines
