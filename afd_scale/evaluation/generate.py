"""Clips of a policy for evaluation: the same prompts and noise for every policy, shared by the ranks."""

from collections.abc import Callable

import torch
from torch import Tensor

from afd_scale.flow.randomness import Randomness
from afd_scale.protocols import Policy
from afd_scale.rollout.sampler import Sampler


def generate(
    policy: Policy, text: Tensor, latent_shape: tuple[int, int, int, int], sampler: Sampler,
    randomness: Randomness, *, clips: int, batch: int, rank: int, size: int, gather: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """Roll out `clips` clips; clip i is of prompt i modulo P and keeps its noise whatever the number of ranks.

    Args:
        text: (P, T, E) embeddings of the prompts.
        latent_shape: (F, C, H, W).
        clips, batch: in all, and at once on a rank.
        gather: rows of all ranks in rank order.
    Returns:
        (clips, F, C, H, W) clean latents, on every rank.
    """
    share = -(-clips // size)  # every rank makes as many, or a collective inside the policy would wait for ever
    keys = [(rank * share + i) % clips for i in range(share)]
    parts = []
    with policy.resident():
        for start in range(0, share, batch):
            part = keys[start : start + batch]
            noise = sampler.draw(randomness, "evaluation", 0, part, latent_shape, text.device)
            rows = torch.tensor([key % len(text) for key in part], device=text.device)
            parts.append(sampler.rollout(policy, text[rows], noise))
    return gather(torch.cat(parts))[:clips]
