"""The ball of a toy world's clips, frame by frame, from their pixels; and how far two sets of paths are apart.

A clip is reduced to one ball a frame: centroid, mass, peak, sharpness.

Units: pixels and frames, height upwards, as in `afd_scale.data.worlds`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from afd_scale.data.worlds.ball import FRAME_SIZE, BoolArray, FloatArray, FrameArray

# A pixel this far above the background is ball, and its eight neighbours are the ball's soft edge; the rest
# is the ripple a trained student leaves. Three tenths of a dim ball: one that fades below is gone.
BALL_LEVEL = 0.15
# A frame shows a ball when nearly all of this lies around one point: a large ball ends 3.1 pixels from its
# centre, noise does not end.
COMPACT_RADIUS = 4.5
COMPACT_SHARE = 0.8
# Frames that may be lost (a flicker); a clip that loses more is none of a ball.
LOST_FRAMES = 2

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
        return np.asarray(self.visible.sum(axis=1) >= self.visible.shape[1] - LOST_FRAMES)


def track(frames: FrameArray) -> Tracks:
    """Find the ball in every frame.

    Args:
        frames: (N, T, FRAME_SIZE, FRAME_SIZE) uint8. The median of a frame is its
            background: no ball covers half of it.
    Raises:
        ValueError: another shape or type.
    """
    if frames.ndim != 4 or frames.shape[2:] != (FRAME_SIZE, FRAME_SIZE) or frames.dtype != np.uint8:
        raise ValueError(
            f"frames ({frames.dtype} {frames.shape}) must be uint8 of shape (N, T, {FRAME_SIZE}, {FRAME_SIZE}): "
            "the metrics know the toy worlds' clips only."
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


def seen_where(tracks: Tracks, seen: BoolArray) -> Tracks:
    """The same clips with a ball in fewer frames, (N, T); in others it stays where it was last seen."""
    visible = tracks.visible & seen
    return replace(tracks, visible=visible, position=_hold_last_seen(tracks.position, visible))


def trajectory_fd(tracks: Tracks, teacher: Tracks) -> float:
    """Frechet distance between Gaussians fitted to the trajectories of two sets of clips.

    The features of a clip are its positions and velocities, standardised by the teacher's mean
    and standard deviation: the unit is the teacher's own spread. Two sets of teacher clips are a little apart
    by chance, the more the fewer they are: compare distances at equal numbers of clips only.
    """
    features, teacher_features = _features(tracks), _features(teacher)
    mean = teacher_features.mean(axis=0)
    std = np.maximum(teacher_features.std(axis=0), MIN_FEATURE_STD)
    return frechet_distance((features - mean) / std, (teacher_features - mean) / std)


def path_fd(tracks: Tracks, teacher: Tracks, start: Tracks) -> float:
    """`trajectory_fd` with a unit that is the same at any time.

    A teacher's balls come to rest, and their spread then with them: over it a slight tremble is far away. Here places
    and velocities, across and upwards, are each over their spread in all frames of the teacher's clips.

    Args:
        start: the teacher's clips, from their launch.
    """
    units = [part.reshape(-1, 2).std(axis=0) for part in (start.position, start.velocity)]
    frames = tracks.position.shape[1]
    unit = np.concatenate([np.tile(units[0], frames), np.tile(units[1], frames - 1)])
    return frechet_distance(_features(tracks) / unit, _features(teacher) / unit)


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


def over_teacher(measured: FloatArray, teacher: FloatArray) -> FloatArray:
    """Over the teacher's mean; 0 when that is 0."""
    mean = teacher.mean()
    return measured / mean if mean > 0 else np.zeros_like(measured)
