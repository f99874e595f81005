"""A tiny random Wan, text encoder, tokenizer and VAE, in diffusers' layout: what the hub's folders are, in 300 kB."""

from pathlib import Path
from typing import Any

import torch

from afd_scale.checkpoint.weights import save_weights
from afd_scale.config import load_config
from afd_scale.config.models import PolicyConfig
from afd_scale.models.wan import CausalWan
from afd_scale.rehearsal.tiny_models import save_wan_models, vae_fields

CHANNELS = 4
TEXT_DIM = 32
VAE_SIZES: dict[str, Any] = {
    **vae_fields(CHANNELS), "latents_mean": [-0.4, 0.1, 0.3, -0.2], "latents_std": [0.5, 0.7, 1.6, 0.9],
}  # fmt: skip


def save_tiny_wan(folder: Path, seed: int = 0, **fields: Any) -> None:
    """Save the parts of a WanPipeline but for its transformer; 4 channels, embeddings of length 32.

    Args:
        seed: of the weights.
        fields: other fields of AutoencoderKLWan.
    """
    save_wan_models(folder, {**VAE_SIZES, **fields}, TEXT_DIM, seed)


def save_tiny_student(folder: Path, config: Path) -> None:
    """Save random start weights of a config's student."""
    run = load_config(config)
    student = run.student.model_copy(update={"lora": None, "weights": None})
    generator = torch.Generator().manual_seed(1)
    weights = CausalWan(student, run.sampler).state_dict().items()
    randoms = ((name, torch.randn(weight.shape, generator=generator) / 10) for name, weight in weights)
    save_weights(randoms, folder, PolicyConfig(student=student, sampler=run.sampler))
