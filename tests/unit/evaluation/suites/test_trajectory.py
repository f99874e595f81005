"""Trajectory metrics: the teacher passes, each known corruption fails what it should."""

import warnings

import numpy as np
import pytest

from afd_scale.data.worlds.ball import FRAME_SIZE, render, simulate
from afd_scale.data.worlds.drop import (
    GRAVITY,
    NUM_FRAMES,
    PromptValues,
    ToyPrompt,
    launch,
    prompt_values,
    render_clips,
)
from afd_scale.evaluation.suites.tracks import frechet_distance, track
from afd_scale.evaluation.suites.trajectory import judge, score

PROMPTS = list(ToyPrompt.every()) * 2
METRICS = {
    "trajectory_fd",
    "dynamic_degree",
    "moving_fraction",
    "prompt_accuracy",
    "physics_strict",
    "all_in_one",
    "acceleration_residual",
    "mass_error",
    "sharpness",
}
PASSES = ("moving_fraction", "prompt_accuracy", "physics_strict", "all_in_one")


@pytest.fixture(scope="module")
def teacher_frames():
    return render_clips(PROMPTS, seed=0)


@pytest.fixture(scope="module")
def teacher_score(teacher_frames):
    return score(render_clips(PROMPTS, seed=1), PROMPTS, teacher_frames)


def _clips(prompts=PROMPTS, time_scale=1.0, fade_to=1.0, **changed):
    """Nominal teacher clips, some attribute values replaced by these arrays or numbers."""
    asked = vars(prompt_values(prompts))
    count = len(prompts)
    values = PromptValues(**{name: np.broadcast_to(changed.get(name, asked[name]), count) for name in asked})
    start, velocity = launch(values, np.full((count, 4), 0.5))
    gravity = values.gravity * time_scale**2
    positions = simulate(start, velocity * time_scale, gravity, values.restitution, values.radius, NUM_FRAMES)
    fading = np.linspace(1.0, fade_to, NUM_FRAMES)
    clips = render(positions, values.radius, values.brightness[:, None] * fading)
    return np.round(clips * 255).astype(np.uint8)


def test_teacher_of_another_seed_passes_everything(teacher_score):
    assert set(teacher_score) == METRICS
    for name in PASSES:
        assert teacher_score[name] >= 0.995, name
    assert teacher_score["trajectory_fd"] < 1.5
    assert teacher_score["dynamic_degree"] == pytest.approx(1.0, abs=0.03)
    assert teacher_score["acceleration_residual"] < 0.06
    assert teacher_score["mass_error"] < 0.02
    assert teacher_score["sharpness"] == pytest.approx(1.0, abs=0.02)


def test_wrong_physics_data_is_a_base_worth_improving(teacher_frames, teacher_score):
    base = score(render_clips(PROMPTS, seed=1, physics="wrong"), PROMPTS, teacher_frames)
    assert 0.4 < base["moving_fraction"] < 0.8
    assert 0.15 < base["prompt_accuracy"] < 0.4
    assert 0.08 < base["all_in_one"] < 0.3
    assert base["trajectory_fd"] > 8 * teacher_score["trajectory_fd"]
    assert base["acceleration_residual"] > 5 * teacher_score["acceleration_residual"]


def test_tracked_centroid_mass_and_peak_are_the_drawn_ones():
    positions = np.random.default_rng(0).uniform(3.2, 12.8, size=(8, NUM_FRAMES, 2))
    frames = render(positions, np.full(8, 2.0), np.full((8, NUM_FRAMES), 0.8))
    tracks = track(np.round(frames * 255).astype(np.uint8))
    np.testing.assert_allclose(tracks.position, positions, atol=0.06)
    np.testing.assert_allclose(tracks.peak, 0.8, atol=0.01)
    assert tracks.visible.all()


def test_a_grey_background_is_subtracted():
    frames = _clips(PROMPTS[:48])  # the dim ones: 40 more does not saturate
    plain, raised = track(frames), track(frames + np.uint8(40))
    np.testing.assert_allclose(raised.position, plain.position)
    np.testing.assert_allclose(raised.mass, plain.mass)


def test_an_unseen_ball_stays_where_it_was_last_seen():
    frames = _clips(PROMPTS[:2])
    whole = track(frames)
    frames[:, 4] = 0
    tracks = track(frames)
    assert not tracks.visible[:, 4].any()
    np.testing.assert_array_equal(tracks.position[:, 4], whole.position[:, 3])


def test_faint_noise_does_not_move_the_ball():
    frames = _clips()
    noise = np.random.default_rng(0).normal(0.0, 6.0, frames.shape)
    noisy = track(np.clip(frames + noise, 0, 255).astype(np.uint8))
    np.testing.assert_allclose(noisy.position, track(frames).position, atol=0.3)
    assert judge(noisy, PROMPTS).prompt_right.mean() > 0.99


def test_static_clips_do_not_move(teacher_frames):
    frames = np.repeat(teacher_frames[:, :1], NUM_FRAMES, axis=1)
    result = score(frames, PROMPTS, teacher_frames)
    for name in ("dynamic_degree", "moving_fraction", "prompt_accuracy", "all_in_one"):
        assert result[name] == 0.0, name


def test_slow_motion_lowers_dynamics_and_fails_the_speed(teacher_frames):
    half = score(_clips(time_scale=0.5), PROMPTS, teacher_frames)
    assert 0.4 < half["dynamic_degree"] < 0.6
    assert half["prompt_accuracy"] == 0.0
    third = score(_clips(time_scale=0.33), PROMPTS, teacher_frames)
    assert third["dynamic_degree"] < half["dynamic_degree"]
    assert third["moving_fraction"] < 0.1


def test_wrong_gravity_fails_prompt_and_physics(teacher_frames):
    none, gentle, strong = GRAVITY.values()
    other = {none: gentle, gentle: strong, strong: none}
    gravity = np.array([other[asked] for asked in prompt_values(PROMPTS).gravity])
    result = score(_clips(gravity=gravity), PROMPTS, teacher_frames)
    for name in ("prompt_accuracy", "physics_strict", "all_in_one"):
        assert result[name] == 0.0, name
    assert result["acceleration_residual"] > 0.3


def test_slightly_wrong_gravity_fails_strict_physics_only():
    prompts = [prompt for prompt in PROMPTS if prompt.gravity != "no"]
    verdicts = judge(track(_clips(prompts, gravity=prompt_values(prompts).gravity * 1.4)), prompts)
    assert not verdicts.physics_strict.any()
    assert verdicts.prompt_right.all()


def test_wrong_bounce_fails_where_a_bounce_is_seen():
    falling = np.array([prompt.gravity != "no" for prompt in PROMPTS])
    swapped = np.where(prompt_values(PROMPTS).restitution == 0.2, 0.85, 0.2)
    verdicts = judge(track(_clips(restitution=swapped)), PROMPTS)
    for verdict in (verdicts.prompt_right, verdicts.physics_strict, verdicts.physics_relaxed):
        np.testing.assert_array_equal(verdict, ~falling)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [("brightness", 0.5, 1.0), ("radius", 1.6, 2.6), ("speed", 0.4, 0.9), ("direction", -1.0, 1.0)],
)
def test_each_swapped_attribute_fails_the_prompt(name, first, second):
    asked = getattr(prompt_values(PROMPTS), name)
    verdicts = judge(track(_clips(**{name: np.where(asked == first, second, first)})), PROMPTS)
    assert not verdicts.prompt_right.any()


def test_mirrored_clips_have_the_wrong_direction(teacher_frames):
    result = score(teacher_frames[..., ::-1], PROMPTS, teacher_frames)
    assert result["prompt_accuracy"] == 0.0
    assert result["dynamic_degree"] == pytest.approx(1.0)


def test_fading_raises_mass_error_and_leaves_the_path(teacher_frames, teacher_score):
    result = score(_clips(fade_to=0.4), PROMPTS, teacher_frames)
    assert result["mass_error"] > 0.25 > 10 * teacher_score["mass_error"]
    assert result["physics_strict"] > 0.99


def test_blur_lowers_sharpness(teacher_frames):
    padded = np.pad(teacher_frames.astype(float), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    size = slice(0, FRAME_SIZE), slice(1, FRAME_SIZE + 1), slice(2, FRAME_SIZE + 2)
    blurred = sum(padded[:, :, rows, columns] for rows in size for columns in size) / 9
    result = score(np.round(blurred).astype(np.uint8), PROMPTS, teacher_frames)
    assert result["sharpness"] < 0.7


@pytest.mark.parametrize("kind", ["black", "grey", "uniform noise", "faint noise", "checkerboard"])
def test_clips_without_a_ball_pass_nothing_and_stay_finite(kind, teacher_frames):
    shape = teacher_frames.shape
    generator = np.random.default_rng(0)
    frames = {
        "black": np.zeros(shape),
        "grey": np.full(shape, 128),
        "uniform noise": generator.integers(0, 256, shape),
        "faint noise": generator.integers(0, 40, shape),
        "checkerboard": np.broadcast_to(np.indices(shape[2:]).sum(axis=0) % 2 * 255, shape),
    }[kind].astype(np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = score(frames, PROMPTS, teacher_frames)
        score(teacher_frames, PROMPTS, frames)
    for name in PASSES:
        assert result[name] == 0.0, name
    assert all(np.isfinite(value) for value in result.values())
    assert result["dynamic_degree"] == 0.0
    assert result["trajectory_fd"] > 20


def test_frechet_distance_of_known_gaussians():
    # Standardised samples: mean 0 and the unit covariance exactly, so the formula can be worked by hand.
    samples = np.random.default_rng(0).normal(size=(500, 3))
    samples -= samples.mean(axis=0)
    samples @= np.linalg.inv(np.linalg.cholesky(np.cov(samples, rowvar=False))).T
    assert frechet_distance(samples, samples) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(samples, samples + np.array([1.0, 2.0, 0.0])) == pytest.approx(5.0)
    assert frechet_distance(samples, samples * [3.0, 1.0, 1.0]) == pytest.approx((3.0 - 1.0) ** 2)
    turned = samples * [3.0, 1.0, 1.0] @ np.array([[0.6, 0.8, 0.0], [-0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    # tr(C1 + C2 - 2 (C1 C2)^1/2), C1 and C2 = diag(9, 1, 1) turned by 90 degrees: 11 + 11 - 2 (3 + 3 + 1).
    quarter = (samples * [3.0, 1.0, 1.0]) @ np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert frechet_distance(samples * [3.0, 1.0, 1.0], quarter) == pytest.approx(8.0)
    assert 0.0 < frechet_distance(samples * [3.0, 1.0, 1.0], turned) < 8.0


def test_bad_input_is_refused(teacher_frames):
    with pytest.raises(ValueError, match=r"prompts \(3\) must be as many"):
        score(teacher_frames, PROMPTS[:3], teacher_frames)
    with pytest.raises(ValueError, match=r"teacher \(1 clips\) must be at least 2"):
        score(teacher_frames, PROMPTS, teacher_frames[:1])
    with pytest.raises(ValueError, match=r"frames \(float64 .*must be uint8"):
        track(teacher_frames / 255.0)
    with pytest.raises(ValueError, match=r"frames \(uint8 .*must be uint8 of shape"):
        track(teacher_frames[:, :, :6])
