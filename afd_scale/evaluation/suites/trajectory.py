"""Motion and physics of toy-world clips, measured from their pixels.

A clip is reduced to one ball a frame (centroid, mass, peak); the prompt says how that ball should look and
move. Physics is judged by synthesis: from where the clip starts, is there a launch with which the simulator
follows the same path? No metric stands alone: a ball that hardly moves has perfect physics where there is no
gravity, a faded ball may look fast.

Units: pixels and frames, height upwards, as in `afd_scale.data.toy_world`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from afd_scale.data.toy_world import (
    FRAME_SIZE,
    GRAVITY,
    LAUNCH_JITTER,
    NUM_FRAMES,
    RESTITUTION,
    FloatArray,
    FrameArray,
    PromptValues,
    ToyPrompt,
    ball_area,
    launch,
    prompt_values,
    simulate,
)

BoolArray = NDArray[np.bool_]

# A pixel this far above the background is ball, and its eight neighbours are the ball's soft edge; the rest
# is the ripple a trained student leaves. Three tenths of a dim ball: one that fades below is gone.
BALL_LEVEL = 0.15
# A frame shows a ball when nearly all of this lies around one point: a large ball ends 3.1 pixels from its
# centre, noise does not end.
COMPACT_RADIUS = 4.5
COMPACT_SHARE = 0.8
# Two frames may be lost (a flicker), more is no clip of a ball.
MIN_VISIBLE_FRAMES = NUM_FRAMES - 2

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

# Features whose teacher spread is smaller than this (pixels) are not blown up further when standardised.
MIN_FEATURE_STD = 0.05


@dataclass(frozen=True)
class Tracks:
    """The ball in N clips of T frames."""

    position: FloatArray  # (N, T, 2) centroid (x, height), pixels; where no ball is seen, the last seen place
    mass: FloatArray  # (N, T) sum of the foreground, in pixels of full brightness
    peak: FloatArray  # (N, T) brightest pixel above the background
    sharpness: FloatArray  # (N, T) squared differences of neighbours per squared level; 0 where no ball is seen
    visible: BoolArray  # (N, T)

    @property
    def velocity(self) -> FloatArray:
        """(N, T - 1, 2) pixels per frame."""
        return np.diff(self.position, axis=1)

    @property
    def acceleration(self) -> FloatArray:
        """(N, T - 2, 2) pixels per frame squared, at the inner frames."""
        return np.diff(self.position, n=2, axis=1)

    @property
    def speed(self) -> FloatArray:
        """(N,) mean over the clip, pixels per frame."""
        return np.asarray(np.linalg.norm(self.velocity, axis=-1).mean(axis=1))

    @property
    def is_ball(self) -> BoolArray:
        """(N,) whether the clip shows a ball nearly all the time."""
        return np.asarray(self.visible.sum(axis=1) >= MIN_VISIBLE_FRAMES)


@dataclass(frozen=True)
class Verdicts:
    """What each of N clips did of what its prompt asked, each (N,)."""

    moving: BoolArray
    prompt_right: BoolArray
    physics_strict: BoolArray
    physics_relaxed: BoolArray
    acceleration_residual: FloatArray  # pixels per frame squared
    mass_error: FloatArray  # relative


def track(frames: FrameArray) -> Tracks:
    """Find the ball in every frame.

    Args:
        frames: (N, NUM_FRAMES, FRAME_SIZE, FRAME_SIZE) uint8. The median of a frame is its
            background: no ball covers half of it.
    Raises:
        ValueError: another shape or type.
    """
    expected = (NUM_FRAMES, FRAME_SIZE, FRAME_SIZE)
    if frames.ndim != 4 or frames.shape[1:] != expected or frames.dtype != np.uint8:
        raise ValueError(
            f"frames ({frames.dtype} {frames.shape}) must be uint8 of shape (N, *{expected}): "
            "the metrics know the toy world's clips only."
        )
    level = frames.astype(np.float64) / 255.0
    level -= np.median(level, axis=(2, 3), keepdims=True)
    level = np.where(_with_neighbours(level >= BALL_LEVEL), np.maximum(level, 0.0), 0.0)

    centres = np.arange(FRAME_SIZE) + 0.5
    mass = level.sum(axis=(2, 3))
    safe_mass = np.maximum(mass, BALL_LEVEL)
    x = (level.sum(axis=2) * centres).sum(axis=-1) / safe_mass
    height = (level.sum(axis=3) * centres[::-1]).sum(axis=-1) / safe_mass

    from_x = (centres - x[..., None]) ** 2
    from_height = (centres[::-1] - height[..., None]) ** 2
    nearby = from_height[..., :, None] + from_x[..., None, :] <= COMPACT_RADIUS**2
    compact = (level * nearby).sum(axis=(2, 3)) >= COMPACT_SHARE * mass
    visible = (mass > 0) & compact

    steps = (np.diff(level, axis=2) ** 2).sum(axis=(2, 3)) + (np.diff(level, axis=3) ** 2).sum(axis=(2, 3))
    energy = np.maximum((level**2).sum(axis=(2, 3)), BALL_LEVEL**2)
    return Tracks(
        position=_hold_last_seen(np.stack([x, height], axis=-1), visible),
        mass=mass,
        peak=level.max(axis=(2, 3)),
        sharpness=np.where(visible, steps / energy, 0.0),
        visible=visible,
    )


def judge(tracks: Tracks, prompts: Sequence[ToyPrompt]) -> Verdicts:
    """Hold N tracked clips against their prompts.

    A clip that does not show a ball nearly all the time passes nothing; its errors count the ball as at rest
    where it was last seen.
    """
    values = prompt_values(prompts)
    path_error, gravity_right, bounce_right = _compare_paths(tracks, values)
    residual, gravity_error = _free_flight_errors(tracks, values)
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
        frames: (N, NUM_FRAMES, FRAME_SIZE, FRAME_SIZE) uint8, N >= 2.
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
        "dynamic_degree": _over_teacher(tracks.speed, teacher.speed),
        "moving_fraction": verdicts.moving.astype(np.float64),
        "prompt_accuracy": verdicts.prompt_right.astype(np.float64),
        "physics_strict": verdicts.physics_strict.astype(np.float64),
        "all_in_one": all_in_one.astype(np.float64),
        "acceleration_residual": verdicts.acceleration_residual,
        "mass_error": verdicts.mass_error,
        "sharpness": _over_teacher(tracks.sharpness.mean(axis=1), teacher.sharpness),
    }


def trajectory_fd(tracks: Tracks, teacher: Tracks) -> float:
    """Frechet distance between Gaussians fitted to the trajectories of two sets of clips.

    The features of a clip are its positions and velocities, 46 numbers, standardised by the teacher's mean
    and standard deviation: the unit is the teacher's own spread. Two sets of teacher clips are a little apart
    by chance, the more the fewer they are: compare distances at equal numbers of clips only.
    """
    features, teacher_features = _features(tracks), _features(teacher)
    mean = teacher_features.mean(axis=0)
    std = np.maximum(teacher_features.std(axis=0), MIN_FEATURE_STD)
    return frechet_distance((features - mean) / std, (teacher_features - mean) / std)


def frechet_distance(first: FloatArray, second: FloatArray) -> float:
    """Squared Frechet distance between Gaussians fitted to (N, D) and (M, D) samples.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2).
    Source: Dowson and Landau, 1982; as used by FID, arXiv:1706.08500.
    """
    covariance, other_covariance = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    eigenvalues, vectors = np.linalg.eigh(np.atleast_2d(covariance))
    root = (vectors * np.sqrt(np.maximum(eigenvalues, 0.0))) @ vectors.T
    overlap = np.linalg.eigvalsh(root @ np.atleast_2d(other_covariance) @ root)
    between_means = ((first.mean(axis=0) - second.mean(axis=0)) ** 2).sum()
    spread = np.trace(np.atleast_2d(covariance)) + np.trace(np.atleast_2d(other_covariance))
    distance = between_means + spread - 2.0 * np.sqrt(np.maximum(overlap, 0.0)).sum()
    return float(max(distance, 0.0))


def _features(tracks: Tracks) -> FloatArray:
    parts = (tracks.position, tracks.velocity)
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def _with_neighbours(mask: BoolArray) -> BoolArray:
    """Grow a mask (..., H, W) by the eight neighbours of each pixel."""
    grown = mask.copy()
    grown[..., 1:, :] |= mask[..., :-1, :]
    grown[..., :-1, :] |= mask[..., 1:, :]
    rows = grown.copy()
    grown[..., 1:] |= rows[..., :-1]
    grown[..., :-1] |= rows[..., 1:]
    return grown


def _hold_last_seen(position: FloatArray, visible: BoolArray) -> FloatArray:
    """Replace unseen places (N, T, 2) by the last seen one, at first by the frame's centre."""
    held = np.empty_like(position)
    last = np.full_like(position[:, 0], FRAME_SIZE / 2)
    for frame in range(position.shape[1]):
        last = np.where(visible[:, frame, None], position[:, frame], last)
        held[:, frame] = last
    return held


def _nominal_speed(values: PromptValues) -> FloatArray:
    """Mean speed (N,) of each prompt's clip with the mean start and no jitter."""
    start, velocity = launch(values, np.full((len(values.speed), 4), 0.5))
    path = simulate(start, velocity, values.gravity, values.restitution, values.radius)
    return np.asarray(np.linalg.norm(np.diff(path, axis=1), axis=-1).mean(axis=1))


def _looks_right(tracks: Tracks, values: PromptValues) -> BoolArray:
    """Brightness, size, direction and horizontal speed, (N,)."""
    brightness = np.median(tracks.peak, axis=1)
    area = np.median(tracks.mass / np.maximum(tracks.peak, BALL_LEVEL), axis=1)
    forward = tracks.position[:, DIRECTION_FRAMES - 1, 0] - tracks.position[:, 0, 0]
    return np.asarray(
        _within(brightness, values.brightness, BRIGHTNESS_TOLERANCE)
        & _within(area, ball_area(values.radius), AREA_TOLERANCE)
        & _within(_horizontal_speed(tracks), values.speed, SPEED_TOLERANCE)
        & (np.sign(forward) == values.direction)
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
    num_clips, num_launches = len(values.gravity), len(LAUNCH_SPEEDS)
    forward = np.repeat(values.direction * _horizontal_speed(tracks), num_launches)
    candidates = simulate(
        start=np.repeat(tracks.position[:, 0], num_launches, axis=0),
        velocity=np.stack([forward, np.tile(LAUNCH_SPEEDS, num_clips)], axis=-1),
        gravity=np.full(num_clips * num_launches, gravity),
        restitution=np.full(num_clips * num_launches, restitution),
        radius=np.repeat(values.radius, num_launches),
    ).reshape(num_clips, num_launches, NUM_FRAMES, 2)
    offset = candidates - tracks.position[:, None]
    in_plane = np.linalg.norm(offset, axis=-1).mean(axis=-1).min(axis=1)
    in_height = np.abs(offset[..., 1]).mean(axis=-1).min(axis=1)
    return in_plane, in_height


def _free_flight_errors(tracks: Tracks, values: PromptValues) -> tuple[FloatArray, FloatArray]:
    """Compare the acceleration in free flight with the prompt's gravity.

    An inner frame is in free flight when neither the step before nor the step after can have met a wall:
    continued without one, forwards and backwards in time, the flight stays inside. A ball never in free
    flight counts as one that ignores gravity.

    Returns:
        (N,) each: mean length of the difference, and vertical component of the mean difference, without sign.
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
    never_free = count == 0
    return np.where(never_free, values.gravity, residual), np.where(never_free, values.gravity, gravity_error)


def _mass_error(tracks: Tracks, values: PromptValues) -> FloatArray:
    """Mean over the frames (N,) of the relative error of the mass."""
    asked = (values.brightness * ball_area(values.radius))[:, None]
    return np.asarray((np.abs(tracks.mass - asked) / asked).mean(axis=1))


def _over_teacher(measured: FloatArray, teacher: FloatArray) -> FloatArray:
    """Over the teacher's mean; 0 when that is 0."""
    mean = teacher.mean()
    return measured / mean if mean > 0 else np.zeros_like(measured)
