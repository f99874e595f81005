"""Small students with random weights, by themselves and as a run leaves them."""

from pathlib import Path

import torch

from afd_scale.checkpoint.lazy import LazyState, open_weights
from afd_scale.checkpoint.weights import CONFIG_NAME, read_config, save_weights
from afd_scale.config import load_config, resolved_yaml
from afd_scale.config.models import PolicyConfig
from afd_scale.models.wan import CausalWan

ROOT = Path(__file__).parents[1]
TOY = {"architecture": "toy", "dim": 32, "num_heads": 4, "ffn_dim": 48, "num_layers": 2}


def save_student(folder: Path, student: dict, **sampler) -> CausalWan:
    """Save a student folder.

    Args:
        student: its section.
        sampler: fields of that section.
    """
    policy = PolicyConfig.model_validate({"student": student, "sampler": {"timesteps": [1000, 500], **sampler}})
    network = CausalWan(policy.student, policy.sampler)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    save_weights(network.state_dict().items(), folder, policy)
    return network


def save_run(folder: Path, shards: Path) -> Path:
    """A finished run of a toy student that learned from these shards."""
    config = load_config(ROOT / "configs" / "toy" / "afd.yaml", [f"data.shards={shards}", "data.source=null"])
    save_student(folder / "checkpoints" / "step_00000004" / "student", TOY)
    (folder / "config.yaml").write_text(resolved_yaml(config))
    return folder


def read_folder(folder: Path) -> tuple[PolicyConfig, LazyState]:
    """A student folder as it was written, whatever its tensors are called."""
    return read_config(folder / CONFIG_NAME), LazyState(open_weights(folder))
