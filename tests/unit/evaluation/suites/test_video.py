"""Each measure of the video suite sees its fault, and no fault where there is none."""

import math

import cv2
import numpy as np
import pytest

from afd_scale.data.worlds.drop import ToyPrompt, render_clips
from afd_scale.evaluation.suites.video import METRICS, chunk_borders, measure_clip, measure_clips

FRAMES, FPS, BORDERS = 12, 8, (4, 8)
TIME = np.arange(FRAMES)
STEADY = 1.5 * TIME  # columns of 64 rows' pixels


def pan(left, rows=64, columns=96):
    """(T, H, W, 3): a window that looks at a coloured pattern, from one place after another."""
    noise = np.random.default_rng(0).normal(size=(rows + 32, 2 * columns, 3)).astype(np.float32)
    pattern = cv2.GaussianBlur(noise, (0, 0), rows / 32)
    pattern = 128 + 45 * pattern / pattern.std()
    moves = [np.float32([[1, 0, place], [0, 1, 8]]) for place in left]
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return levels([cv2.warpAffine(pattern, move, (columns, rows), flags=how) for move in moves])


def levels(values):
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def measured(clip, borders=None, fps=FPS):
    return measure_clip(clip, fps, borders).values


def lit(clip, factors):
    """The clip with each frame's brightness times a factor."""
    return levels(clip * np.asarray(factors)[:, None, None, None])


def test_a_still_clip_has_no_fault():
    values = measured(pan(0 * TIME), BORDERS)
    still = ("motion", "dynamic_degree", "jerkiness", "flicker", "brightness_drift", "colour_drift")
    assert {name: values[name] for name in still} == dict.fromkeys(still, 0.0)
    assert (values["border_jump"], values["border_jerk"]) == (1, 1)
    assert list(values) == list(METRICS)


def test_motion_is_the_speed_in_heights_a_second():
    values = measured(pan(STEADY))
    assert values["motion"] == pytest.approx(1.5 * FPS / 64, rel=0.05)
    assert measured(pan(STEADY / 3))["motion"] == pytest.approx(0.5 * FPS / 64, rel=0.1)
    assert (values["dynamic_degree"], measured(pan(STEADY / 3))["dynamic_degree"]) == (1, 0)


def test_motion_of_a_small_ball_is_the_balls():
    slow, fast = (
        next(prompt for prompt in ToyPrompt.every() if prompt.speed == speed and prompt.gravity == "no")
        for speed in ("slowly", "quickly")
    )
    for clip, speed in zip(render_clips([slow, fast], seed=0), (0.4, 0.9), strict=True):
        assert measured(clip)["motion"] == pytest.approx(speed * FPS / 16, rel=0.35)


def test_jerkiness_is_of_motion_that_changes():
    shaken = STEADY + 2 * np.random.default_rng(0).normal(size=FRAMES)
    smooth, shaky, to_and_fro = (
        measured(pan(places))["jerkiness"] for places in (STEADY, shaken, 8 + 3 * (-1.0) ** TIME)
    )
    assert smooth < 0.05
    assert shaky > 0.5
    assert to_and_fro == pytest.approx(2, abs=0.1)


def test_flicker_is_neither_motion_nor_a_fade():
    factors = 1 + 0.04 * (-1.0) ** TIME
    for clip in (pan(0 * TIME), pan(TIME)):  # whole pixels: nothing is sharper in one frame than in the next
        assert measured(clip)["flicker"] < 0.1
        assert measured(lit(clip, np.linspace(1, 0.5, FRAMES)))["flicker"] < 0.1
        assert measured(lit(clip, factors))["flicker"] == pytest.approx(100 * 0.08 * clip.mean() / 255, rel=0.1)


def test_flicker_of_noise_that_is_new_in_each_frame():
    clip = pan(0 * TIME)
    noise = np.random.default_rng(0).normal(0, 6, (FRAMES, 64, 96, 1))
    assert measured(levels(clip + noise))["flicker"] > 0.5
    assert measured(levels(clip + noise[:1]))["flicker"] == 0, "the same in every frame does not flicker"


def test_one_flash_and_one_lasting_step_differ():
    clip = pan(0 * TIME)
    flash, step = (lit(clip, np.where(where, 1.2, 1)) for where in (TIME == 6, TIME >= 6))
    assert measured(flash)["flicker"] > 0.5
    assert measured(step)["flicker"] < 0.1


def test_sharpness_falls_with_blur_not_with_contrast():
    clip = pan(STEADY)
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 2) for frame in clip])
    sharp = measured(clip)["sharpness"]
    assert measured(blurred)["sharpness"] < 0.8 * sharp
    assert measured(levels(64 + clip / 2.0))["sharpness"] == pytest.approx(sharp, rel=0.02)
    assert measured(np.full_like(clip, 90))["sharpness"] == 0


def test_brightness_drifts_alone_under_a_fade():
    clip = pan(0 * TIME)
    values = measured(lit(clip, np.linspace(1, 0.5, FRAMES)))
    assert values["brightness_drift"] > 10
    assert values["colour_drift"] < 1.5
    assert values["brightness"] < measured(clip)["brightness"] - 10


def test_colour_drifts_without_brightness():
    clip = pan(0 * TIME).astype(float)
    towards_red = np.linspace(0, 1, FRAMES)[:, None, None, None] * [30.0, -9.0, 0.0]  # of about equal lightness
    values = measured(levels(clip + towards_red))
    assert values["colour_drift"] > 4
    assert values["brightness_drift"] < 1
    grey = measured(clip.mean(axis=3).astype(np.uint8))
    assert (grey["saturation"], grey["colour_drift"]) == (0, 0)
    assert values["saturation"] > 5


def test_a_jump_of_brightness_at_the_borders():
    clip = pan(STEADY)
    steps = 1.12 ** (np.searchsorted(BORDERS, TIME, side="right"))
    assert measured(clip, BORDERS)["border_jump"] == pytest.approx(1, abs=0.1)
    assert measured(lit(clip, steps), BORDERS)["border_jump"] > 4
    assert measured(lit(clip, steps), (6,))["border_jump"] < 1, "the jumps are elsewhere"


def test_a_jump_of_place_or_speed_at_the_borders():
    jumping = STEADY + 6 * np.searchsorted(BORDERS, TIME, side="right")
    turning = np.cumsum(np.where((TIME // 4) % 2, -2, 2))
    assert measured(pan(STEADY), BORDERS)["border_jerk"] == pytest.approx(1, abs=0.2)
    for places in (jumping, turning):
        assert measured(pan(places), BORDERS)["border_jerk"] > 10


def test_borders_that_are_unknown_or_everywhere_are_left_out():
    clip = pan(STEADY)
    for borders in (None, (), (FRAMES,), range(1, FRAMES)):
        assert not {"border_jump", "border_jerk"} & set(measured(clip, borders)), borders
    assert chunk_borders(12, 3) == (3, 6, 9)
    assert chunk_borders(33, 12, 9) == (9, 21)
    assert chunk_borders(12, 12) == ()


@pytest.mark.parametrize("rows", [480, 192, 96])
def test_the_size_of_a_clip_hardly_matters(rows):
    def of_rows(number):
        return measured(pan(STEADY * number / 64, number, number * 3 // 2))

    expected, values = of_rows(64), of_rows(rows)
    assert values["motion"] == pytest.approx(expected["motion"], rel=0.05)
    assert values["sharpness"] == pytest.approx(expected["sharpness"], rel=0.1)
    for name in ("jerkiness", "flicker"):
        assert values[name] < 0.4


def test_the_rate_of_a_clip_hardly_matters():
    twice = np.linspace(0, STEADY[-1], 2 * FRAMES - 1)
    assert measured(pan(twice), fps=2 * FPS)["motion"] == pytest.approx(measured(pan(STEADY))["motion"], rel=0.1)


def test_values_by_time_tell_when():
    clip = pan(0 * TIME)
    fading = lit(clip, np.where(TIME < 6, 1, np.linspace(1.5, 0.5, FRAMES)))
    by_time = measure_clip(fading, FPS).by_time
    assert by_time["brightness_drift"][:2] == pytest.approx([0, 0])
    assert by_time["brightness_drift"][2] < by_time["brightness_drift"][3]
    assert not {"dynamic_degree", "border_jump"} & set(by_time)
    assert all(len(values) == 4 for values in by_time.values())
    assert math.isnan(measure_clip(clip[:3], FPS, bins=8).by_time["flicker"][0]), "no triple begins so early"


def test_policies_are_measured_side_by_side():
    clips = {physics: render_clips(ToyPrompt.every()[::8], seed=1, physics=physics) for physics in ("teacher", "wrong")}
    values = measure_clips(clips, FPS, (3, 6, 9))
    assert list(values) == ["teacher", "wrong"]
    assert values["wrong"]["motion"] < 0.8 * values["teacher"]["motion"]
    assert values["wrong"]["brightness_drift"] > 2 * values["teacher"]["brightness_drift"]


@pytest.mark.parametrize(
    "clip",
    [
        np.zeros((2, 16, 16), np.uint8),
        np.zeros((12, 16, 16, 4), np.uint8),
        np.zeros((12, 16, 16)),
        np.zeros((12, 0, 16), np.uint8),
        np.zeros((12, 16), np.uint8),
    ],
)
def test_what_is_no_clip_is_refused(clip):
    with pytest.raises(ValueError, match="must be uint8"):
        measure_clip(clip, FPS)
