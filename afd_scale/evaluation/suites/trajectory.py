"""Motion and physics of toy-world clips, measured from their pixels.

A clip is reduced to one ball a frame (`tracks`); the prompt says how that ball should look and move. Physics is judged
by synthesis: from where the clip starts, is there a launch with which the simulator follows the same path? No metric
stands alone: a ball that hardly moves has perfect physics where there is no gravity, a faded ball may look fast.

Units: pixels and frames, height upwards, as in `afd_scale.data.worlds.drop`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from afd_scale.data.worlds.ball import FRAME_SIZE, BoolArray, FloatArray, FrameArray, ball_area, simulate
from afd_scale.data.worlds.drop import (
    GRAVITY,
    LAUNCH_JITTER,
    NUM_FRAMES,
    RESTITUTION,
    PromptValues,
    ToyPrompt,
    launch,
    prompt_values,
)
from afd_scale.evaluation.suites.tracks import BALL_LEVEL, Tracks, over_teacher, path_fd, track, trajectory_fd

# Share of the speed its prompt asks for below which a clip does not count as moving. Start and jitter move
# the teacher's share between 0.7 and 1.3.
MOVING_SHARE = 0.6

# How far off, relative to the asked value, an attribute is still right. The ranges of two words never
# overlap: the closest pair is speed, 0.4 * 1.35 < 0.9 * 0.65. The teacher's own spread is below 0.1.
BRIGHTNESS_TOLERANCE = 0.25
AREA_TOLERANCE = 0.35
SPEED_TOLERANCE = 0.35
# Frames in which the asked direction is read: no side wall can turn a teacher's ball this early.
DIRECTION_FRAMES = 8

# Mean distance (pixels) between the clip and the closest path of its prompt's physics. The teacher's worst is
# 0.10 in 9,600 clips, from soft edges and from the grid of launches. Strict leaves room for a shaky student,
# relaxed is a third of the small ball's radius, hardly seen by eye.
STRICT_PATH_ERROR = 0.25
RELAXED_PATH_ERROR = 0.6
# A ball that soon lies still is near many paths: strict physics also bounds the error of the gravity measured
# in free flight (pixels per frame squared) to a third of the gentle one. The teacher's worst is 0.05.
STRICT_GRAVITY_ERROR = 0.07
# Vertical launch speeds tried, a little beyond the teacher's range; steps of 0.02 end within 0.11 pixels of
# any other.
LAUNCH_SPEEDS = np.linspace(-1.2 * LAUNCH_JITTER, 1.2 * LAUNCH_JITTER, 19)
# A frame this close to a bounce (pixels) says nothing about free flight.
CONTACT_MARGIN = 0.3


@dataclass(frozen=True)
class Verdicts:
    """What each of N clips did of what its prompt asked, each (N,)."""

    moving: BoolArray
    prompt_right: BoolArray
    physics_strict: BoolArray
    physics_relaxed: BoolArray
    acceleration_residual: FloatArray  # pixels per frame squared
    mass_error: FloatArray  # relative


def judge(tracks: Tracks, prompts: Sequence[ToyPrompt]) -> Verdicts:
    """Hold N tracked clips against their prompts.

    A clip that does not show a ball nearly all the time passes nothing; its errors count the ball as at rest
    where it was last seen.
    """
    values = prompt_values(prompts)
    path_error, gravity_right, bounce_right = _compare_paths(tracks, values)
    residual, gravity_error, _ = _free_flight_errors(tracks, values)
    on_path = (path_error <= STRICT_PATH_ERROR) & (gravity_error <= STRICT_GRAVITY_ERROR)
    return Verdicts(
        moving=tracks.is_ball & (tracks.speed >= MOVING_SHARE * _nominal_speed(values)),
        prompt_right=tracks.is_ball & _looks_right(tracks, values) & gravity_right & bounce_right,
        physics_strict=tracks.is_ball & on_path,
        physics_relaxed=tracks.is_ball & (path_error <= RELAXED_PATH_ERROR),
        acceleration_residual=residual,
        mass_error=_mass_error(tracks, values),
    )


def score(frames: FrameArray, prompts: Sequence[ToyPrompt], teacher: FrameArray | Tracks) -> dict[str, float]:
    """Score generated clips against their prompts and against the teacher.

    Args:
        frames: (N, T, FRAME_SIZE, FRAME_SIZE) uint8, N >= 2.
        prompts: N prompts the clips were generated from.
        teacher: (M, ...) teacher clips of the same mixture of prompts, M >= 2, or their tracks; no need to pair them.
    Returns:
        The metrics that `ToySuite` describes; what is judged clip by clip as its mean over the clips.
    Raises:
        ValueError: the numbers of clips and prompts differ, or there are too few clips.
    """
    tracks, reference = track(frames), teacher if isinstance(teacher, Tracks) else track(teacher)
    for name, clips in (("frames", tracks), ("teacher", reference)):
        if len(clips.mass) < 2:
            raise ValueError(f"{name} ({len(clips.mass)} clips) must be at least 2: a Gaussian is fitted to them.")
    each = score_each(tracks, prompts, reference)
    return {"trajectory_fd": trajectory_fd(tracks, reference)} | {name: float(x.mean()) for name, x in each.items()}


def score_each(tracks: Tracks, prompts: Sequence[ToyPrompt], teacher: Tracks) -> dict[str, FloatArray]:
    """(N,) of each metric that one clip has.

    Raises:
        ValueError: the numbers of clips and prompts differ.
    """
    if len(tracks.mass) != len(prompts):
        raise ValueError(f"prompts ({len(prompts)}) must be as many as frames ({len(tracks.mass)}): one for each clip.")
    verdicts = judge(tracks, prompts)
    all_in_one = verdicts.moving & verdicts.prompt_right & verdicts.physics_relaxed
    return {
        "dynamic_degree": over_teacher(tracks.speed, teacher.speed),
        "moving_fraction": verdicts.moving.astype(np.float64),
        "prompt_accuracy": verdicts.prompt_right.astype(np.float64),
        "physics_strict": verdicts.physics_strict.astype(np.float64),
        "all_in_one": all_in_one.astype(np.float64),
        "acceleration_residual": verdicts.acceleration_residual,
        "mass_error": verdicts.mass_error,
        "sharpness": over_teacher(tracks.sharpness.mean(axis=1), teacher.sharpness),
    }


def score_part(tracks: Tracks, prompts: Sequence[ToyPrompt], teacher: Tracks, start: Tracks) -> dict[str, float]:
    """What can be told of a part of a longer motion, against the teacher's clips of the same time.

    Paths are told from a launch, and a part begins anywhere. A ball that rests on the floor, or stays beside a wall,
    says nothing about flight; one that is not there does.

    Args:
        start: the teacher's clips, from their launch.
    """
    values = prompt_values(prompts)
    residual, _, flies = _free_flight_errors(tracks, values)
    told = residual[flies | ~tracks.is_ball]
    return {
        "trajectory_fd": trajectory_fd(tracks, teacher),
        "path_fd": path_fd(tracks, teacher, start),
        "dynamic_degree": float(over_teacher(tracks.speed, teacher.speed).mean()),
        "attributes_right": float((tracks.is_ball & _attributes_right(tracks, values)).mean()),
        "acceleration_residual": float(told.mean()) if len(told) else np.nan,
        "mass_error": float(_mass_error(tracks, values).mean()),
        "sharpness": float(over_teacher(tracks.sharpness.mean(axis=1), teacher.sharpness).mean()),
    }


def _nominal_speed(values: PromptValues) -> FloatArray:
    """Mean speed (N,) of each prompt's clip with the mean start and no jitter."""
    start, velocity = launch(values, np.full((len(values.speed), 4), 0.5))
    path = simulate(start, velocity, values.gravity, values.restitution, values.radius, NUM_FRAMES)
    return np.asarray(np.linalg.norm(np.diff(path, axis=1), axis=-1).mean(axis=1))


def _looks_right(tracks: Tracks, values: PromptValues) -> BoolArray:
    """Brightness, size, direction and horizontal speed, (N,)."""
    forward = tracks.position[:, DIRECTION_FRAMES - 1, 0] - tracks.position[:, 0, 0]
    return np.asarray(_attributes_right(tracks, values) & (np.sign(forward) == values.direction))


def _attributes_right(tracks: Tracks, values: PromptValues) -> BoolArray:
    """What walls and bounces leave as it is: brightness, size and horizontal speed, (N,)."""
    brightness = np.median(tracks.peak, axis=1)
    area = np.median(tracks.mass / np.maximum(tracks.peak, BALL_LEVEL), axis=1)
    return np.asarray(
        _within(brightness, values.brightness, BRIGHTNESS_TOLERANCE)
        & _within(area, ball_area(values.radius), AREA_TOLERANCE)
        & _within(_horizontal_speed(tracks), values.speed, SPEED_TOLERANCE)
    )


def _within(measured: FloatArray, asked: FloatArray, tolerance: float) -> BoolArray:
    return np.asarray(np.abs(measured - asked) <= tolerance * asked)


def _horizontal_speed(tracks: Tracks) -> FloatArray:
    """(N,) pixels per frame; the median is untouched by the one step in which a wall turns the ball."""
    return np.asarray(np.median(np.abs(tracks.velocity[..., 0]), axis=1))


def _compare_paths(tracks: Tracks, values: PromptValues) -> tuple[FloatArray, BoolArray, BoolArray]:
    """Explain each path by every gravity and bounciness.

    Returns:
        (N,) each: mean distance to the closest path of the prompt's own physics, pixels; whether the prompt's
        gravity explains the heights best; whether, given that gravity, its bounciness does (true without
        gravity: nothing bounces).
    """
    worlds = list(itertools.product(GRAVITY.values(), RESTITUTION.values()))
    height_errors = np.empty((len(worlds), len(values.gravity)))
    path_errors = np.empty_like(height_errors)
    for row, (gravity, restitution) in enumerate(worlds):
        path_errors[row], height_errors[row] = _path_error(tracks, values, gravity, restitution)
    clips = np.arange(len(values.gravity))
    gravities, restitutions = np.array(worlds).T
    own_gravity = gravities[:, None] == values.gravity
    own_world = own_gravity & (restitutions[:, None] == values.restitution)
    gravity_right = gravities[height_errors.argmin(axis=0)] == values.gravity
    best_bounce = restitutions[np.where(own_gravity, height_errors, np.inf).argmin(axis=0)]
    bounce_right = (values.gravity == 0) | (best_bounce == values.restitution)
    return path_errors[own_world.argmax(axis=0), clips], gravity_right, bounce_right


def _path_error(
    tracks: Tracks, values: PromptValues, gravity: float, restitution: float
) -> tuple[FloatArray, FloatArray]:
    """Mean distance (N,) to the closest path of one gravity and bounciness, in the plane and in height alone.

    The candidates start at the clip's first place, at its own horizontal speed in the asked direction, with
    each of `LAUNCH_SPEEDS` upwards.
    """
    num_clips, num_launches, frames = len(values.gravity), len(LAUNCH_SPEEDS), tracks.position.shape[1]
    forward = np.repeat(values.direction * _horizontal_speed(tracks), num_launches)
    candidates = simulate(
        start=np.repeat(tracks.position[:, 0], num_launches, axis=0),
        velocity=np.stack([forward, np.tile(LAUNCH_SPEEDS, num_clips)], axis=-1),
        gravity=np.full(num_clips * num_launches, gravity),
        restitution=np.full(num_clips * num_launches, restitution),
        radius=np.repeat(values.radius, num_launches),
        frames=frames,
    ).reshape(num_clips, num_launches, frames, 2)
    offset = candidates - tracks.position[:, None]
    in_plane = np.linalg.norm(offset, axis=-1).mean(axis=-1).min(axis=1)
    in_height = np.abs(offset[..., 1]).mean(axis=-1).min(axis=1)
    return in_plane, in_height


def _free_flight_errors(tracks: Tracks, values: PromptValues) -> tuple[FloatArray, FloatArray, BoolArray]:
    """Compare the acceleration in free flight with the prompt's gravity.

    An inner frame is in free flight when neither the step before nor the step after can have met a wall:
    continued without one, forwards and backwards in time, the flight stays inside. A ball never in free
    flight counts as one that ignores gravity.

    Returns:
        (N,) each: mean length of the difference, vertical component of the mean difference, without sign, and whether
        the ball was ever in free flight.
    """
    drop = np.stack([np.zeros_like(values.gravity), values.gravity], axis=-1)[:, None]
    before, at, after = tracks.position[:, :-2], tracks.position[:, 1:-1], tracks.position[:, 2:]
    lowest = values.radius[:, None, None] + CONTACT_MARGIN
    highest = FRAME_SIZE - lowest
    free = np.ones(at.shape[:2], dtype=bool)
    for place in (before, at, after, 2 * at - before - drop, 2 * at - after - drop):
        free &= ((place >= lowest) & (place <= highest)).all(axis=-1)
    difference = (tracks.acceleration + drop) * free[..., None]
    count = free.sum(axis=1)
    residual = np.linalg.norm(difference, axis=-1).sum(axis=1) / np.maximum(count, 1)
    gravity_error = np.abs(difference[..., 1].sum(axis=1)) / np.maximum(count, 1)
    flies = count > 0
    return np.where(flies, residual, values.gravity), np.where(flies, gravity_error, values.gravity), flies


def _mass_error(tracks: Tracks, values: PromptValues) -> FloatArray:
    """Mean over the frames (N,) of the relative error of the mass."""
    asked = (values.brightness * ball_area(values.radius))[:, None]
    return np.asarray((np.abs(tracks.mass - asked) / asked).mean(axis=1))
