"""What the toy worlds share: one ball that flies and bounces in a square, and how it is drawn.

Units: pixels and frames. A position is (x, height): x to the right and height upwards from the lower left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
FrameArray = NDArray[np.uint8]
BoolArray = NDArray[np.bool_]

Physics = Literal["teacher", "wrong"]

FRAME_SIZE = 16
FPS = 8.0
SUBSTEPS_PER_FRAME = 8
WALL_RESTITUTION = 1.0

ROUGH_IMPACT = 0.3  # a ball that comes down slower than this rolls on


@dataclass(frozen=True)
class Turns:
    """Horizontal speeds, pixels per frame, that N balls take at random.

    Attributes:
        kick_frame, kicked: (N,) the frame after which a ball is kicked, and its speed then.
        bounced: (N, B) its speed after each bounce off a rough floor; the last one stays.
    """

    kick_frame: FloatArray
    kicked: FloatArray
    bounced: FloatArray


def simulate(
    start: FloatArray, velocity: FloatArray, gravity: FloatArray, restitution: FloatArray, radius: FloatArray,
    frames: int, turns: Turns | None = None,
) -> FloatArray:  # fmt: skip
    """Let N balls fly and bounce between floor, ceiling and side walls.

    Args:
        start: (N, 2) centre at frame 0, pixels.
        velocity: (N, 2) at frame 0, pixels per frame.
        gravity: (N,) downward acceleration, pixels per frame squared.
        restitution: (N,) share of the vertical speed kept by a bounce off floor or ceiling.
        radius: (N,) pixels.
        turns: of the horizontal speed; None leaves it to the walls.
    Returns:
        (N, frames, 2) centres.
    """
    position, velocity = start.copy(), velocity.copy()
    acceleration = np.stack([np.zeros_like(gravity), -gravity], axis=-1)
    kept = np.stack([np.full_like(restitution, WALL_RESTITUTION), restitution], axis=-1)
    lowest = radius[:, None]
    highest = FRAME_SIZE - lowest
    step = 1.0 / SUBSTEPS_PER_FRAME
    bounces = np.zeros(len(start), dtype=np.int64)
    path = [position]
    for frame in range(frames - 1):
        if turns is not None:
            velocity[:, 0] = np.where(turns.kick_frame == frame, turns.kicked, velocity[:, 0])
        for _ in range(SUBSTEPS_PER_FRAME):
            position = position + velocity * step + acceleration * (0.5 * step**2)
            velocity = velocity + acceleration * step
            beyond = np.minimum(position - lowest, 0.0) + np.maximum(position - highest, 0.0)
            outward = beyond * velocity > 0
            if turns is not None:
                rough = outward[:, 1] & (velocity[:, 1] < -ROUGH_IMPACT)
                after = turns.bounced[np.arange(len(start)), np.minimum(bounces, turns.bounced.shape[1] - 1)]
                velocity[:, 0] = np.where(rough, after, velocity[:, 0])
                bounces = bounces + rough
            position = position - beyond * (1.0 + kept)
            velocity = np.where(outward, -kept * velocity, velocity)
        path.append(position)
    return np.stack(path, axis=1)


def render(positions: FloatArray, radius: FloatArray, brightness: FloatArray) -> FloatArray:
    """Draw one anti-aliased ball a frame on black.

    Args:
        positions: (N, T, 2) centres, pixels.
        radius: (N,) pixels.
        brightness: (N, T) in [0, 1].
    Returns:
        (N, T, FRAME_SIZE, FRAME_SIZE) in [0, 1], row 0 at the top.
    """
    centres = np.arange(FRAME_SIZE) + 0.5
    from_x = (centres - positions[..., :1]) ** 2
    from_height = (centres[::-1] - positions[..., 1:]) ** 2
    distance = np.sqrt(from_height[..., :, None] + from_x[..., None, :])
    coverage = np.clip(radius[:, None, None, None] + 0.5 - distance, 0.0, 1.0)
    return np.asarray(coverage * brightness[..., None, None])


def to_bytes(clips: FloatArray) -> FrameArray:
    """[0, 1] to uint8."""
    return np.round(clips * 255.0).astype(np.uint8)


def ball_area(radius: FloatArray) -> FloatArray:
    """Sum of the pixels of a rendered ball of brightness 1: the disc and its one-pixel soft edge."""
    return math.pi * (radius**2 + 1.0 / 12.0)


def uniform_draws(seed: int, stream: int, first_index: int, count: int, numbers: int) -> FloatArray:
    """(count, numbers) on [0, 1), keyed by (seed, stream, first_index + row): no row depends on how many there are."""
    draws = np.empty((count, numbers))
    for row in range(count):
        sequence = np.random.SeedSequence((seed, stream, first_index + row))
        draws[row] = np.random.Generator(np.random.Philox(sequence)).random(numbers)
    return draws


def between(limits: tuple[float, float], draw: FloatArray) -> FloatArray:
    """Uniform draws within limits."""
    return limits[0] + (limits[1] - limits[0]) * draw


def signed(draw: FloatArray) -> FloatArray:
    """Uniform draws on [-1, 1)."""
    return 2.0 * draw - 1.0
