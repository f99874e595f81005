"""Distances between distributions, by split and by time."""

import math

import numpy as np
import pytest

from afd_scale.evaluation.comparison import MeasuredClip, chance_level, compare, wasserstein
from afd_scale.evaluation.suites.video import METRICS, ClipMeasures


def clips(values, split=None, late=0.0):
    """Clips of these motions, which are more by `late` in the second half of their time."""
    return [
        MeasuredClip(
            f"{number}.mp4", "a cat", split, ClipMeasures({"motion": value}, {"motion": [value, value + late]})
        )
        for number, value in enumerate(values)
    ]


def test_wasserstein_by_hand():
    assert wasserstein(np.array([0.0, 1, 3]), np.array([5.0, 6, 8])) == pytest.approx(5)
    assert wasserstein(np.array([0.0, 0, 0, 4]), np.array([0.0])) == pytest.approx(1)
    assert wasserstein(np.array([0.0, 2]), np.array([2.0, 0])) == 0
    first, second = np.random.default_rng(0).normal(size=(2, 50)) * [[1], [2]]
    assert wasserstein(first, second) == pytest.approx(np.abs(np.sort(first) - np.sort(second)).mean())


def test_chance_covers_draws_of_one_distribution_and_no_shift():
    random = np.random.default_rng(0)
    within = [wasserstein(*pair) <= chance_level(*pair) for pair in random.normal(size=(40, 2, 30))]
    assert np.mean(within) > 0.85
    first, second = random.normal(size=(2, 30))
    assert wasserstein(first, second + 2) > 1.5 * chance_level(first, second + 2)


def test_all_clips_and_each_split():
    source = clips([1.0, 3.0], "seen") + clips([7.0], "unseen")
    teacher = clips([2.0, 4.0], "seen") + clips([5.0], "longer")
    splits = compare(source, teacher, METRICS)
    assert list(splits) == ["all", "longer", "seen", "unseen"]
    assert splits["all"]["clips"] == {"source": 3, "teacher": 3}
    seen = splits["seen"]["metrics"]["motion"]
    assert (seen["source"], seen["teacher"], seen["distance"], seen["distance_in_spreads"]) == (2, 3, 1, 1)
    lone = splits["unseen"]["metrics"]["motion"]
    assert (lone["source"], lone["teacher"], lone["distance"], lone["chance"]) == (7, None, None, None)
    assert list(splits["all"]["metrics"]) == ["motion"], "what no clip has is left out"


def test_differences_by_time():
    by_time = compare(clips([1.0, 2.0], late=3), clips([1.0, 2.0]), METRICS)["all"]["metrics"]["motion"]["by_time"]
    assert [found["distance"] for found in by_time] == [0, 3]
    assert [found["source"] for found in by_time] == [1.5, 4.5]
    empty = clips([math.nan])
    assert compare(empty, empty, METRICS)["all"]["metrics"]["motion"]["by_time"][0]["distance"] is None


def test_differences_by_length_are_of_parts():
    def long(values):
        return MeasuredClip(
            "a", "a cat", None, ClipMeasures({"motion": values[0]}, {}, [{"motion": x} for x in values])
        )

    draws = np.random.default_rng(0).normal(size=(40, 8))
    source, teacher = [long(row) for row in draws], clips(np.random.default_rng(1).normal(size=40))
    found = compare(source, teacher, METRICS)["all"]["metrics"]["motion"]["by_length"]
    assert list(found) == ["0-1x", "1-2x", "2-4x", "4-8x"]
    assert found["4-8x"]["source"] == pytest.approx(draws[:, 4:].mean())
    assert found["4-8x"]["source_spread"] > 0.8, "of a part, not of the mean of four"
    assert all(span["distance"] < 1.1 * span["chance"] for span in found.values())
    assert compare(teacher, teacher, METRICS)["all"]["metrics"]["motion"]["by_length"] == {}


def test_a_teacher_without_spread_has_no_unit():
    found = compare(clips([1.0]), clips([2.0]), METRICS)["all"]["metrics"]["motion"]
    assert (found["distance"], found["distance_in_spreads"]) == (1, None)
