"""Judges against pairs and metrics, in cases worked by hand."""

import math

import numpy as np
import pytest

from afd_scale.evaluation.agreement import (
    brier_score,
    calibration_error,
    finite,
    goodness,
    group_agreement,
    judge_report,
    ranks,
    right_pairs,
    spearman,
)

LOGIT_70, LOGIT_90 = math.log(7 / 3), math.log(9)  # of probabilities 0.7 and 0.9


def test_what_a_judge_makes_of_four_pairs():
    report = judge_report([1.0, 0.0], [[0.0, 3.0], [-1.0, 0.0]])
    assert report["pair_accuracy"] == pytest.approx((1 + 0 + 1 + 0.5) / 4), "an undecided pair is half right"
    assert report["logit_gap"] == pytest.approx((1 - 2 + 1 + 0) / 4)
    assert report["logit_group_std"] == pytest.approx((math.sqrt(4.5) + math.sqrt(0.5)) / 2)
    odds = [-1.0, 2.0, -1.0, 0.0]
    assert report["win_probability"] == pytest.approx(np.mean([1 / (1 + math.exp(-x)) for x in odds]))
    assert "logit_group_std" not in judge_report([1.0], [[0.0]]), "one rollout has no spread"


def test_calibration_is_by_bins_of_confidence():
    # Two pairs said with 0.7, one of them right; two with 0.9, both right.
    margins = [LOGIT_70, -LOGIT_70, LOGIT_90, LOGIT_90]
    assert calibration_error(margins, bins=5) == pytest.approx(0.5 * abs(0.5 - 0.7) + 0.5 * abs(1 - 0.9))
    assert calibration_error(margins, bins=1) == pytest.approx(abs(0.75 - 0.8))
    assert calibration_error([0.0]) == 0, "undecided, and half right"
    assert calibration_error([1e4, -1e4]) == pytest.approx(0.5), "sure, and wrong once; without overflow"


def test_calibration_is_that_of_the_first_of_a_pair_in_either_order():
    """Shown in both orders, the probability that the first is the teacher's: its error and Brier score by hand."""
    margins = np.random.default_rng(0).normal(0.4, 1.5, 200)
    said = np.concatenate([1 / (1 + np.exp(-margins)), 1 / (1 + np.exp(margins))])
    is_first = np.concatenate([np.ones(200), np.zeros(200)])
    assert brier_score(margins) == pytest.approx(np.mean((said - is_first) ** 2))
    error = 0.0
    for low in np.arange(10) / 10:
        here = (said >= low) & (said < low + 0.1)
        error += here.mean() * abs(is_first[here].mean() - said[here].mean()) if here.any() else 0.0
    assert calibration_error(margins, bins=5) == pytest.approx(error)
    assert brier_score([0.0]) == 0.25
    assert brier_score([1e4, -1e4]) == pytest.approx(0.5), "without overflow"


def test_an_undecided_pair_is_half_right():
    assert right_pairs([[1.0, 0.0], [-1.0, 2.0]]) == pytest.approx(2.5 / 4)


def test_ranks_of_equal_values_are_shared():
    assert ranks([30, 10, 20, 10]).tolist() == [4, 1.5, 3, 1.5]


def test_rank_correlation():
    assert spearman([1, 2, 3, 4], [1, 4, 9, 16]) == pytest.approx(1)
    assert spearman([1, 2, 3], [9, 4, 1]) == pytest.approx(-1)
    # Without ties 1 - 6 sum d^2 / (n (n^2 - 1)): d = 0, 1, -1, 0.
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    # Ranks 1 2 3 against 1.5 1.5 3: covariance 1.5, variances 2 and 1.5.
    assert spearman([1, 2, 3], [0, 0, 1]) == pytest.approx(1.5 / math.sqrt(2 * 1.5))
    assert math.isnan(spearman([1, 2], [5, 5]))


def test_agreement_is_within_groups():
    scores, values = [[0, 1], [10, 11], [20, 21]], [[5, 6], [4, 3], [1, 1]]
    assert group_agreement(scores, values) == 0, "one agrees, one does not, one says nothing; not 1 as across groups"
    assert group_agreement(scores[:1], values[:1]) == 1
    assert math.isnan(group_agreement(scores[2:], values[2:]))
    assert group_agreement(scores, [[5, 6], [math.nan, 3], [1, 1]]) == 1, "a group with a missing value says nothing"


def test_more_is_better_of_every_metric():
    assert goodness([1.0, 3.0], "higher", 2.5).tolist() == [1, 3]
    assert goodness([1.0, 3.0], "lower", 2.5).tolist() == [-1, -3]
    assert goodness([1.0, 3.0], "teacher", 2.5).tolist() == [-1.5, -0.5]


def test_what_cannot_be_said_is_left_out():
    assert finite({"a": 1.0, "b": math.nan, "c": math.inf}) == {"a": 1.0}
