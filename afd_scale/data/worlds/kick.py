"""The second toy world: a ball that is kicked once, over a rough floor, in longer clips.

Where a prompt of the first world nearly fixes its clip, here chance decides again and again: when the ball is kicked
and which way, and where each bounce throws it. What the future holds cannot be known, gravity and bounciness can. A
student that takes one step a chunk must choose a future; one that is trained to predict the teacher's clips takes their
mean.

Units: pixels and frames, heights upwards, as in `ball`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from afd_scale.data.worlds.ball import (
    FRAME_SIZE,
    FloatArray,
    FrameArray,
    Physics,
    Turns,
    between,
    render,
    signed,
    simulate,
    to_bytes,
    uniform_draws,
)
from afd_scale.data.worlds.words import Vocabulary, WorldPrompt, meanings

WORLD_VERSION = "kick 1"  # of what is rendered; part of what shards were made from
NUM_FRAMES = 18
RADIUS = 2.0

# Each attribute's words and what they mean. No word occurs twice: the text embedding is a bag of words.
BRIGHTNESS = {"dim": 0.5, "bright": 1.0}
DIRECTION = {"leftward": -1.0, "rightward": 1.0}
GRAVITY = {"no": 0.0, "gentle": 0.09, "strong": 0.24}
RESTITUTION = {"clay": 0.2, "rubber": 0.9}
VOCABULARY = (BRIGHTNESS, DIRECTION, GRAVITY, RESTITUTION)

# Other sentences with the same attributes, of at most 16 words. A bag of words has no order: what is new in them is
# the words around.
PARAPHRASES = (
    "someone throws a {brightness} ball {direction} above {bounciness} ground with {gravity} gravity then kicks it",
    "{direction} flies a {brightness} ball until one kick while {gravity} gravity pulls towards {bounciness} soil",
    "{gravity} gravity a {bounciness} floor and one {brightness} ball going {direction} before somebody kicks it",
    "video of one {brightness} object launched {direction} hit midway {gravity} gravity {bounciness} surface below",
)

SIDE_GAP = (0.5, 6.0)  # between the ball's edge and the wall that it leaves
DROP_HEIGHT = (5.0, 10.0)  # above the floor, at the start; without gravity it stays there
SPEED = (0.35, 0.85)  # along the floor, at the start, after the kick and after each bounce
LAUNCH = 0.15  # most speed upwards or downwards at the start
KICK_FRAMES = (5, 14)  # after one of them, the last one excluded; before it the ball moves as its prompt says
BOUNCES = 6  # whose direction is drawn

# What base students learn from: as sharp and as quick as the teacher's, but most of it falls and bounces as it likes.
WEAK_RIGHT = 0.2
WEAK_GRAVITY = (-0.15, 0.15)
WEAK_RESTITUTION = (0.0, 1.2)

_STREAM = {"teacher": 11, "wrong": 12}  # the first world's are 1 and 2
NUM_DRAWS = 9 + BOUNCES


@dataclass(frozen=True)
class KickPrompt(WorldPrompt):
    """One of the 24 prompts; every field holds the attribute's word."""

    vocabulary: ClassVar[Vocabulary] = VOCABULARY
    wording: ClassVar[str] = (
        "a {brightness} ball is thrown {direction} and kicked once under {gravity} gravity over a {bounciness} floor"
    )
    world_name: ClassVar[str] = "the world of kicks"

    brightness: str
    direction: str
    gravity: str
    bounciness: str


@dataclass(frozen=True)
class KickValues:
    """The numbers behind N prompts, each (N,)."""

    brightness: FloatArray
    direction: FloatArray
    gravity: FloatArray
    restitution: FloatArray


def prompt_values(asked: Sequence[KickPrompt]) -> KickValues:
    """Look up what the prompts' words mean, as one array an attribute."""
    return KickValues(*meanings(asked, VOCABULARY))


def render_clips(
    asked: Sequence[KickPrompt], *, seed: int, first_index: int = 0, physics: Physics = "teacher",
    begin: int = 0, frames: int = NUM_FRAMES,
) -> FrameArray:  # fmt: skip
    """Render one clip a prompt; arguments, randomness and shape as of the first world's `render_clips`."""
    values, draws = prompt_values(asked), uniform_draws(seed, _STREAM[physics], first_index, len(asked), NUM_DRAWS)
    gravity, restitution = values.gravity, values.restitution
    if physics == "wrong":
        right = draws[:, 6] < WEAK_RIGHT
        gravity = np.where(right, gravity, between(WEAK_GRAVITY, draws[:, 7]))
        restitution = np.where(right, restitution, between(WEAK_RESTITUTION, draws[:, 8]))
    paths = fly(values.direction, gravity, restitution, draws, begin + frames)[:, begin:]
    brightness = np.repeat(values.brightness[:, None], frames, axis=1)
    return to_bytes(render(paths, np.full(len(asked), RADIUS), brightness))


def fly(
    direction: FloatArray, gravity: FloatArray, restitution: FloatArray, draws: FloatArray, frames: int = NUM_FRAMES
) -> FloatArray:
    """(N, frames, 2) centres of N balls by (N, NUM_DRAWS) uniform draws."""
    gap = between(SIDE_GAP, draws[:, 0]) + RADIUS
    start = np.stack([np.where(direction > 0, gap, FRAME_SIZE - gap), RADIUS + between(DROP_HEIGHT, draws[:, 1])], -1)
    velocity = np.stack([direction * between(SPEED, draws[:, 2]), LAUNCH * signed(draws[:, 3])], -1)
    first, end = KICK_FRAMES
    turns = Turns(
        kick_frame=np.floor(first + (end - first) * draws[:, 4]),
        kicked=_either_way(draws[:, 5]),
        bounced=_either_way(draws[:, 9 : 9 + BOUNCES]),
    )
    return simulate(start, velocity, gravity, restitution, np.full(len(start), RADIUS), frames, turns)


def _either_way(draw: FloatArray) -> FloatArray:
    """A speed to the left or to the right by one uniform draw."""
    side = np.where(draw < 0.5, -1.0, 1.0)
    return np.asarray(side * between(SPEED, 2.0 * draw % 1.0))
