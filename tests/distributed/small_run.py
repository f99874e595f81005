"""A small AFD run: the toy config with a small random student, few clips and no pretraining."""

from pathlib import Path
from typing import Any

import torch
import yaml

from afd_scale.checkpoint.weights import save_weights
from afd_scale.config import load_config
from afd_scale.config.models import PolicyConfig
from afd_scale.models.wan import CausalWan
from tests.distributed.processes import ROOT

SHAPE = {"architecture": "toy", "dim": 64, "num_heads": 4, "ffn_dim": 96, "num_layers": 2}
CLIPS = 192


def write_small_run(folder: Path, steps: int) -> Path:
    """Write `afd.yaml` and the student's start weights; the config's path."""
    tree: dict[str, Any] = yaml.safe_load((ROOT / "configs/toy/afd.yaml").read_text())
    tree |= {"requires": None, "out": str(folder / "runs"), "name": "afd"}
    tree["student"] |= {**SHAPE, "weights": str(folder / "start")}
    tree["data"] |= {"shards": str(folder / "shards"), "global_batch": 4}
    tree["data"]["source"] |= {"clips": CLIPS}
    tree["train"] = {"steps": steps, "log_every": 1}
    tree["evaluation"] = {"clips": 4, "batch": 2, "samples": 2}
    tree["method"] |= {"discriminator_warmup_steps": 2, "rollouts_per_prompt": 2}
    path = folder / "afd.yaml"
    path.write_text(yaml.safe_dump(tree))
    config = load_config(path)
    student = CausalWan(config.student, config.sampler)
    generator = torch.Generator().manual_seed(1)
    for parameter in student.parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    policy = PolicyConfig(student=config.student, sampler=config.sampler)
    save_weights(student.state_dict().items(), folder / "start", policy)
    return path
