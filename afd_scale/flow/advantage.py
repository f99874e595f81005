"""From the discriminator's logits to the weights of AFD's loss.

Rewards of one prompt's rollouts stand together: (P, G), P prompts of this rank by G rollouts. Batch statistics span all
data ranks, so they take `mean`, an average over ranks of the shares' means (equal shares).
"""

import torch
from torch import Tensor

from afd_scale.types import RankMean


def centre(reward: Tensor, baseline: str, mean: RankMean) -> Tensor:
    """(P, G) rewards minus the batch mean, or minus the mean of their prompt's group."""
    if baseline == "group":
        return reward - reward.mean(dim=1, keepdim=True)
    return reward - mean(reward.mean())


def divide_by_spread(centred: Tensor, spread: str, floor: float, mean: RankMean) -> Tensor:
    """(P, G) centred rewards over their root mean square in the group or the batch, at least `floor`."""
    if spread == "none":
        return centred
    if spread == "group":
        square = centred.square().mean(dim=1, keepdim=True)
    else:
        square = mean(centred.square().mean())
    return centred / square.sqrt().clamp(min=floor)


def weight_from_advantage(advantage: Tensor, clip: float) -> Tensor:
    """w = clamp(r / (2 clip) + 1/2, 0, 1): an advantage clipped to +-clip, mapped to [0, 1]."""
    return (advantage / (2 * clip) + 0.5).clamp(0, 1)


def most_telling(weight: Tensor, count: int) -> Tensor:
    """(P, count) which of each prompt's weights (P, G) differ most: the best and the worst, as many of each as make the
    variance largest; in ascending order.

    Source: max-variance down-sampling of rollouts, PODS, arXiv:2504.13818.
    """
    order = weight.argsort(dim=1, descending=True)
    ends = torch.stack([
        torch.cat([order[:, :best], order[:, order.shape[1] - (count - best) :]], dim=1) for best in range(count + 1)
    ])  # fmt: skip
    variance = torch.stack([weight.gather(1, rows).var(dim=1, correction=0) for rows in ends])
    chosen = ends.gather(0, variance.argmax(dim=0)[None, :, None].expand(1, -1, count))[0]
    return chosen.sort(dim=1).values
