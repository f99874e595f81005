"""Metrics of the world of kicks: the teacher passes, each known fault fails what it should."""

import numpy as np
import pytest

from afd_scale.data.worlds.kick import KickPrompt, render_clips
from afd_scale.evaluation.suites.kick import WORST_ERROR, KickSuite, score, score_each
from afd_scale.evaluation.suites.tracks import track

PROMPTS = list(KickPrompt.every()) * 8


@pytest.fixture(scope="module")
def clips() -> np.ndarray:
    return render_clips(PROMPTS, seed=0)


@pytest.fixture(scope="module")
def reference() -> object:
    return track(render_clips(PROMPTS, seed=1))


def scored(frames: np.ndarray, reference: object) -> dict[str, float]:
    return score(frames, PROMPTS, reference)


def test_the_teacher_passes(clips, reference) -> None:
    found = scored(clips, reference)
    assert list(found) == list(KickSuite.metrics)
    assert found["trajectory_fd"] < 2.5  # of so few clips
    assert found["gravity_error"] < 0.01
    assert found["probe_gravity_error"] < 0.01
    assert found["gravity_slope"] == pytest.approx(1, abs=0.03)
    assert found["dynamic_degree"] == pytest.approx(1, abs=0.05)
    assert found["prompt_accuracy"] == found["permanence"] == 1
    assert found["sharp_fraction"] > 0.98


def test_each_fault_fails_what_it_should(clips, reference) -> None:
    good = scored(clips, reference)
    still = np.repeat(clips[:, :1], clips.shape[1], axis=1)
    shifts = [np.roll(clips, (up, right), axis=(2, 3)) for up in range(-2, 3) for right in range(-2, 3)]
    blurred = np.mean(shifts, axis=0).astype(np.uint8)
    gone = clips.copy()
    gone[:, 9] = 0
    backwards = clips[:, :, :, ::-1]
    swapped = clips[np.arange(len(clips)).reshape(-1, 3, 2)[:, ::-1].reshape(-1)]  # other gravities
    assert scored(still, reference)["dynamic_degree"] == 0
    assert scored(still, reference)["gravity_slope"] == pytest.approx(0, abs=1e-9)
    assert scored(blurred, reference)["sharp_fraction"] < 0.3
    assert scored(blurred, reference)["dynamic_degree"] < 0.3, "the speed of a blurred ball does not count"
    assert scored(blurred, reference)["gravity_error"] > 0.2, "nor does its fall"
    assert scored(blurred, reference)["gravity_error_smeared"] < 0.1
    assert scored(gone, reference)["permanence"] == 0
    assert scored(backwards, reference)["prompt_accuracy"] == 0
    assert scored(swapped, reference)["gravity_error"] > good["gravity_error"] + 0.05
    assert scored(swapped, reference)["probe_gravity_error"] > good["probe_gravity_error"] + 0.05
    assert scored(still, reference)["trajectory_fd"] > 2 * good["trajectory_fd"]


def test_what_shows_no_ball_has_the_worst_error(reference) -> None:
    nothing = np.zeros((len(PROMPTS), 18, 16, 16), np.uint8)
    found = scored(nothing, reference)
    assert found["gravity_error"] == pytest.approx(WORST_ERROR)
    assert found["gravity_error_sharp"] == WORST_ERROR
    assert found["gravity_slope"] == found["sharp_fraction"] == found["permanence"] == 0


def test_means_of_clips_are_the_metrics(clips, reference) -> None:
    each, whole = score_each(clips, PROMPTS, reference), scored(clips, reference)
    for name, values in each.items():
        assert whole[name] == pytest.approx(np.nanmean(values))
