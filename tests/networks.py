"""Small networks and batches, for tests of what uses them."""

from typing import Any

import torch

from afd_scale.config.models import PolicyConfig
from afd_scale.layers.ops import ModelOps
from afd_scale.models.wan import CausalWan
from afd_scale.types import Batch, Prompts, Videos


def make_policy(fields: dict[str, Any], ops: ModelOps | None = None) -> CausalWan:
    """A student from the fields of both its sections."""
    policy = PolicyConfig.model_validate(fields)
    return CausalWan(policy.student, policy.sampler, ops)


def make_prompts(embeddings: torch.Tensor, keys: tuple[int, ...] | None = None) -> Prompts:
    keys = tuple(range(len(embeddings))) if keys is None else keys
    names = tuple(f"prompt {key}" for key in keys)
    return Prompts(names, names, keys, embeddings)


def make_videos(latents: torch.Tensor, embeddings: torch.Tensor, keys: tuple[int, ...] | None = None) -> Videos:
    return Videos(make_prompts(embeddings, keys), latents)


def make_batch(latents: torch.Tensor, embeddings: torch.Tensor, keys: tuple[int, ...] | None = None) -> Batch:
    """Teacher videos and no extra prompts."""
    videos = make_videos(latents, embeddings, keys)
    return Batch(videos, videos.prompts[:0])
