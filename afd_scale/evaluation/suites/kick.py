"""The suite of the world of kicks: how the ball falls, whether it stays a ball, and how much moves.

A smear is no ball: one is seen where it is at least half as sharp as the teacher's. It matters, for the mean of all
futures falls as it should: a student that predicts it has the right gravity and shows nothing that moves.
`gravity_error_smeared` takes any blob for a ball, to compare.

Gravity is measured in free flight, by the mean change of the vertical speed between frames that no bounce can lie
between. A clip that shows no ball, or one that never flies, has the strongest gravity's error.
`probe_gravity_error` is of another measure that shares nothing with this one (gravity_probe.py), and sees smears fall
too: a gain that one of the two sees alone is none. A still ball has an easy life under some of these metrics: read them
together.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from afd_scale.data.worlds.ball import FRAME_SIZE, BoolArray, FloatArray, ball_area
from afd_scale.data.worlds.kick import GRAVITY, RADIUS, KickPrompt, KickValues, prompt_values
from afd_scale.evaluation.suites.gravity_probe import probed_gravity
from afd_scale.evaluation.suites.suite import Metric
from afd_scale.evaluation.suites.tracks import Tracks, over_teacher, path_fd, seen_where, track, trajectory_fd
from afd_scale.evaluation.suites.world import Each, WorldSuite
from afd_scale.mp4 import FrameArray

CONTACT_MARGIN = 0.4  # pixels: a frame this close to floor or ceiling says nothing about free flight
FREE_FRAMES = 4  # at least, that gravity is measured from
WORST_ERROR = max(GRAVITY.values())
SEEN = 0.5  # of the teacher's mean sharpness, from which on a blob is a ball
SHARP = 0.75  # of the same: nearly all of the teacher's frames have it
SHARP_CLIP = 0.8  # share of the frames of a sharp clip
BRIGHTNESS_TOLERANCE, MASS_TOLERANCE = 0.25, 0.35  # relative
DIRECTION_FRAMES = 5  # before the first kick


class KickSuite(WorldSuite):
    """Of the world of kicks."""

    world: ClassVar[str] = "kick"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "trajectory_fd": Metric("Trajectory distance", "lower", "Fréchet distance of paths to the teacher's"),
        "gravity_error": Metric("Gravity error", "lower", "of the fall in free flight, pixels per frame squared"),
        "gravity_error_sharp": Metric("Gravity error, sharp", "lower", "the same, of clips that are sharp all along"),
        "gravity_error_smeared": Metric("Gravity error, any blob", "lower", "the same, where a smear is a ball too"),
        "probe_gravity_error": Metric("Gravity error, probe", "lower", "the same, by a network that sees pixels alone"),
        "gravity_slope": Metric("Gravities told apart", "teacher", "rise of the measured fall with the asked one"),
        "dynamic_degree": Metric("Dynamic degree", "teacher", "mean speed of a ball that is seen, over the teacher's"),
        "sharp_fraction": Metric("Sharp", "higher", "share of frames with a sharp ball"),
        "prompt_accuracy": Metric("Prompt right", "higher", "share of clips as bright and going where they should"),
        "permanence": Metric("Permanence", "higher", "share of clips whose ball is all there in every frame"),
    }
    # The direction is the prompt's until the kick.
    over_time: ClassVar[Mapping[str, Metric]] = {
        "trajectory_fd": Metric("Trajectory distance", "lower", "Fréchet distance of paths to the teacher's then"),
        "path_fd": Metric("Path distance", "lower", "the same in one unit at any time: the spread of its start"),
        "gravity_error": Metric("Gravity error", "lower", "of the fall, of clips whose ball is seen to fly"),
        "gravity_error_sharp": Metric("Gravity error, sharp", "lower", "the same, of clips that are sharp all along"),
        "gravity_slope": Metric("Gravities told apart", "teacher", "rise of the measured fall with the asked one"),
        "dynamic_degree": Metric("Dynamic degree", "teacher", "mean speed of a sharp ball over the teacher's then"),
        "sharp_fraction": Metric("Sharp", "higher", "share of frames with a sharp ball"),
        "brightness_right": Metric("Brightness right", "higher", "share of clips as bright as they should be"),
        "permanence": Metric("Permanence", "higher", "share of clips whose ball is all there in every frame"),
    }

    @staticmethod
    def score(clips: FrameArray, asked: Sequence[KickPrompt], teacher: Tracks) -> dict[str, float]:
        return score(clips, asked, teacher)

    @staticmethod
    def score_part(clips: FrameArray, asked: Sequence[KickPrompt], teacher: Tracks, start: Tracks) -> dict[str, float]:
        return score_part(clips, asked, teacher, start)

    @staticmethod
    def score_each(clips: FrameArray, asked: Sequence[KickPrompt], teacher: Tracks) -> Each:
        return score_each(clips, asked, teacher)


def score(clips: FrameArray, asked: Sequence[KickPrompt], teacher: Tracks) -> dict[str, float]:
    """All metrics of N clips against their prompts and the teacher's tracks."""
    tracks, values = track(clips), prompt_values(asked)
    seen = _seen(tracks, teacher)
    gravity, is_measured = measured_gravity(seen)
    means = {name: _mean(each) for name, each in _of_each(clips, tracks, seen, values, teacher).items()}
    whole = {"trajectory_fd": trajectory_fd(seen, teacher),
             "gravity_slope": _slope(values.gravity[is_measured], gravity[is_measured])}  # fmt: skip
    return {name: (whole | means)[name] for name in KickSuite.metrics}


def score_part(clips: FrameArray, asked: Sequence[KickPrompt], teacher: Tracks, start: Tracks) -> dict[str, float]:
    """All of `over_time` of a part of a longer motion, against the teacher's clips of the same time.

    Clips of a ball that rests, or bounces too often to fly between, say nothing about gravity.

    Args:
        start: the teacher's clips, from their launch.
    """
    tracks, values = track(clips), prompt_values(asked)
    seen = _seen(tracks, teacher)
    each = _of_each(clips, tracks, seen, values, teacher)
    gravity, is_measured = measured_gravity(seen)
    rests = seen.is_ball & ~is_measured
    for name in [name for name in each if "gravity_error" in name]:
        if np.isfinite(each[name]).any():  # else no clip is sharp, and the error the worst
            each[name] = np.where(rests, np.nan, each[name])
            if not np.isfinite(each[name]).any():
                del each[name]
    found = {name: _mean(values) for name, values in each.items()} | {
        "trajectory_fd": trajectory_fd(seen, teacher),
        "path_fd": path_fd(seen, teacher, start),
        "gravity_slope": _slope(values.gravity[is_measured], gravity[is_measured]),
        "brightness_right": float(_bright(seen, values).mean()),
    }
    return {name: found.get(name, np.nan) for name in KickSuite.over_time}


def score_each(clips: FrameArray, asked: Sequence[KickPrompt], teacher: Tracks) -> dict[str, FloatArray]:
    """(N,) of each metric that one clip has; NaN where it has none."""
    tracks = track(clips)
    return _of_each(clips, tracks, _seen(tracks, teacher), prompt_values(asked), teacher)


def _of_each(
    clips: FrameArray, tracks: Tracks, seen: Tracks, values: KickValues, teacher: Tracks
) -> dict[str, FloatArray]:
    error = _gravity_error(seen, values)
    sharp = tracks.visible & (tracks.sharpness >= SHARP * teacher.sharpness.mean())
    is_sharp = sharp.mean(axis=1) >= SHARP_CLIP
    moved = np.linalg.norm(seen.velocity, axis=-1) * (seen.visible[:, 1:] & seen.visible[:, :-1])
    return {
        "gravity_error": error,
        "gravity_error_sharp": np.where(is_sharp, error, np.nan),
        "gravity_error_smeared": _gravity_error(tracks, values),
        "probe_gravity_error": np.minimum(np.abs(probed_gravity(clips) - values.gravity), WORST_ERROR),
        "dynamic_degree": over_teacher(moved.mean(axis=1), teacher.speed),
        "sharp_fraction": sharp.mean(axis=1),
        "prompt_accuracy": _prompt_right(seen, values).astype(np.float64),
        "permanence": _permanent(seen, values).astype(np.float64),
    }


def measured_gravity(tracks: Tracks) -> tuple[FloatArray, BoolArray]:
    """(N,) downward acceleration in free flight, pixels per frame squared, and whether there is a ball that flies.

    An inner frame is in free flight when neither the step before it nor the one after it can have met floor or
    ceiling: continued, forwards and backwards in time, the flight stays inside.
    """
    height = tracks.position[..., 1]
    before, at, after = height[:, :-2], height[:, 1:-1], height[:, 2:]
    low, high = RADIUS + CONTACT_MARGIN, FRAME_SIZE - RADIUS - CONTACT_MARGIN
    places = np.stack([before, at, after, 2 * at - before, 2 * at - after])
    seen = tracks.visible[:, :-2] & tracks.visible[:, 1:-1] & tracks.visible[:, 2:]
    free = ((places >= low) & (places <= high)).all(axis=0) & seen
    count = free.sum(axis=1)
    fall = -((after - 2 * at + before) * free).sum(axis=1) / np.maximum(count, 1)
    return np.asarray(fall), np.asarray((count >= FREE_FRAMES) & tracks.is_ball)


def _seen(tracks: Tracks, teacher: Tracks) -> Tracks:
    return seen_where(tracks, tracks.sharpness >= SEEN * teacher.sharpness.mean())


def _gravity_error(tracks: Tracks, values: KickValues) -> FloatArray:
    gravity, is_measured = measured_gravity(tracks)
    error = np.minimum(np.abs(gravity - values.gravity), WORST_ERROR)
    return np.where(is_measured, error, WORST_ERROR)


def _prompt_right(tracks: Tracks, values: KickValues) -> BoolArray:
    """Brightness, and the direction before any kick, (N,)."""
    forward = tracks.position[:, DIRECTION_FRAMES - 1, 0] - tracks.position[:, 0, 0]
    return np.asarray(_bright(tracks, values) & (np.sign(forward) == values.direction))


def _bright(tracks: Tracks, values: KickValues) -> BoolArray:
    """Whether there is a ball as bright as it should be, (N,)."""
    brightness = np.median(tracks.peak, axis=1)
    near = np.abs(brightness - values.brightness) <= BRIGHTNESS_TOLERANCE * values.brightness
    return np.asarray(tracks.is_ball & near)


def _permanent(tracks: Tracks, values: KickValues) -> BoolArray:
    """Whether every frame shows one ball that weighs what it should, (N,)."""
    mass = (values.brightness * ball_area(np.full(len(values.brightness), RADIUS)))[:, None]
    return np.asarray((tracks.visible & (np.abs(tracks.mass - mass) <= MASS_TOLERANCE * mass)).all(axis=1))


def _mean(values: FloatArray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else WORST_ERROR


def _slope(asked: FloatArray, measured: FloatArray) -> float:
    """Of the least-squares line; 0 where nothing is asked in two ways."""
    spread = asked - asked.mean() if len(asked) else asked
    square = float((spread**2).sum())
    return float((spread * measured).sum()) / square if square > 0 else 0.0
