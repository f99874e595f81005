"""From the discriminator's logits to the weights of AFD's loss.

Rewards of one prompt's rollouts stand together: (P, G), P prompts of this rank by G rollouts. Batch statistics span all
data ranks, so they take `mean`, an average over ranks of the shares' means (equal shares).
"""

from collections.abc import Sequence

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


def window_starts(chunks: int, seen: int, windows: int) -> list[int]:
    """The chunks that so many windows of `seen` chunks begin with, spread evenly from the first to the last place."""
    last = chunks - seen
    return [round(last * number / (windows - 1)) for number in range(windows)] if windows > 1 else [0]


def by_chunk(weight: Tensor, starts: Sequence[int], seen: int) -> Tensor:
    """(P, G, chunks) means of the weights of those windows that hold a chunk; each is held by one at least.

    Args:
        weight: (P W, G) of the W windows of each prompt's rollouts.
        starts: W, rising, the chunks that they begin with.
        seen: chunks of a window.
    """
    holds = weight.new_zeros(len(starts), starts[-1] + seen)  # the last window ends with the video
    for window, start in enumerate(starts):
        holds[window, start : start + seen] = 1
    return torch.einsum("pwg,wc->pgc", weight.unflatten(0, (-1, len(starts))), holds / holds.sum(0))


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


def over_mean(weight: Tensor, mean: RankMean) -> Tensor:
    """(B,) weights over their mean in the batch: equal ones are 1, and so is the mean."""
    return weight / mean(weight.mean()).clamp(min=1e-6)


def resampled(reward: Tensor, count: int, uniform: Tensor, temperature: float, floor: float) -> Tensor:
    """(P, count) which of each prompt's rollouts are drawn, with replacement, in ascending order.

    One is drawn with probability softmax(standardised reward / temperature) over its group. The draw is systematic: so
    many equal steps through the cumulated probabilities, so that one of probability q is drawn floor or ceil of
    count q times.

    Args:
        reward: (P, G).
        uniform: (P,) in [0, 1), where in its first step each prompt begins.
        floor: smallest standard deviation to divide by.
    Source: systematic resampling, Carpenter et al., IEE Proceedings 1999.
    """
    centred = reward - reward.mean(dim=1, keepdim=True)
    spread = centred.square().mean(dim=1, keepdim=True).sqrt().clamp(min=floor)
    reached = (centred / spread / temperature).softmax(dim=1).cumsum(dim=1)
    places = (uniform[:, None] + torch.arange(count, device=uniform.device)) / count
    # Rounding may leave the last sum below 1.
    return torch.searchsorted(reached, places.to(reached), right=True).clamp(max=reward.shape[1] - 1)
