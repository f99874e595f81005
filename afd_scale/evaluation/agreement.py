"""What a judge's logits say, and whether they agree with what is measured: plain functions of numbers.

P prompts, each with one video of the teacher and G rollouts: logits are (P,) and (P, G).
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from afd_scale.evaluation.suites.suite import Better

FloatArray = NDArray[np.float64]

CALIBRATION_BINS = 5  # of confidence, from 1/2 to 1: a few dozen pairs fill no more


def judge_report(teacher: ArrayLike, rollouts: ArrayLike) -> dict[str, float]:
    """What a judge makes of pairs: accuracy, win probability of a rollout, calibration, gap and spread of logits.

    Args:
        teacher: (P,) logits of the teacher's videos; none of a judge that has not seen them.
        rollouts: (P, G) of rollouts of their prompts; with G of 1 there is no spread.
    """
    real, fake = np.asarray(teacher, np.float64), np.asarray(rollouts, np.float64)
    report = {}
    if real.size:
        margin = real[:, None] - fake
        report = {
            "pair_accuracy": right_pairs(margin),
            "win_probability": float(_sigmoid(-margin).mean()),
            "calibration_error": calibration_error(margin),
            "logit_gap": float(margin.mean()),
        }
    if fake.shape[1] > 1:
        report["logit_group_std"] = float(fake.std(axis=1, ddof=1).mean())
    return report


def calibration_error(margins: ArrayLike, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error of the Bradley-Terry probability.

    A judge names the video with the higher logit as the teacher's, with confidence sigmoid(|margin|) in [1/2, 1]. Pairs
    are put into bins of equal width by it; the error is the mean over pairs of |share that is right - mean confidence|
    of their bin. An undecided pair is half right.

    Args:
        margins: logit of the teacher's video minus that of the rollout, of each pair.
    Source: Naeini et al., 2015; Guo et al., arXiv:1706.04599.
    """
    margin = np.asarray(margins, np.float64).ravel()
    right, confidence = _right(margin), _sigmoid(np.abs(margin))
    numbers = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    error = 0.0
    for number in np.unique(numbers):
        here = numbers == number
        error += here.mean() * abs(right[here].mean() - confidence[here].mean())
    return float(error)


def brier_score(margins: ArrayLike) -> float:
    """Mean squared error of the Bradley-Terry probability that the first video of a pair is the teacher's.

    Shown in either order a pair has the same error, (1 - sigmoid(margin))^2; a judge that always says 1/2 has 1/4. So
    it is with `calibration_error`: over both orders of each pair, in twice as many bins of the probability itself, it
    is the same number.

    Args:
        margins: as of `calibration_error`.
    """
    return float((_sigmoid(-np.asarray(margins, np.float64)) ** 2).mean())


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Rank correlation of two rows of numbers, equal ones sharing the mean of their ranks; NaN where a row is all
    equal."""
    a, b = ranks(first), ranks(second)
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float((a**2).sum() * (b**2).sum()))
    return float((a * b).sum() / scale) if scale else math.nan


def ranks(values: ArrayLike) -> FloatArray:
    """Ranks from 1, those of equal values their mean."""
    row = np.asarray(values, np.float64)
    below = (row[None, :] < row[:, None]).sum(axis=1)
    equal = (row[None, :] == row[:, None]).sum(axis=1)
    return np.asarray(below + (equal + 1) / 2, np.float64)


def group_agreement(scores: ArrayLike, values: ArrayLike) -> float:
    """Mean over groups of the rank correlation within them; groups in which one of the two is all equal, or a value is
    missing (NaN), say nothing, and NaN is what no group says.

    Args:
        scores, values: (P, G).
    """
    score, value = np.asarray(scores, np.float64), np.asarray(values, np.float64)
    said = [spearman(a, b) for a, b in zip(score, value, strict=True) if not np.isnan(b).any()]
    said = [one for one in said if not math.isnan(one)]
    return float(np.mean(said)) if said else math.nan


def goodness(values: ArrayLike, better: Better, teacher_mean: float) -> FloatArray:
    """A metric turned so that more is better: as it is, negated, or minus the distance to the teacher's mean."""
    value = np.asarray(values, np.float64)
    if better == "teacher":
        return -np.abs(value - teacher_mean)
    return value if better == "higher" else -value


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """Without those that could not be said."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


def right_pairs(margins: ArrayLike) -> float:
    """Share of the pairs whose higher logit is the teacher's video's; an undecided pair is half right."""
    return float(_right(np.asarray(margins, np.float64)).mean())


def _right(margin: FloatArray) -> FloatArray:
    return np.asarray((margin > 0) + 0.5 * (margin == 0), np.float64)


def _sigmoid(x: FloatArray) -> FloatArray:
    return np.asarray(0.5 * (1 + np.tanh(x / 2)), np.float64)  # without overflow
