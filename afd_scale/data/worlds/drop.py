"""The procedural teacher of the toy world: small grey clips of one ball under gravity.

A prompt fixes six attributes; the start and a little of the launch speed are random; from there the motion is
deterministic. Every attribute can be measured back from the pixels (`afd_scale.evaluation.suites.trajectory`),
except the bounciness of the floor where nothing falls.

Units: pixels and frames. A position is (x, height): x to the right and height upwards from the lower left.
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
    between,
    render,
    signed,
    simulate,
    to_bytes,
    uniform_draws,
)
from afd_scale.data.worlds.words import Vocabulary, WorldPrompt, meanings

WORLD_VERSION = 1  # of what is rendered; part of what shards were made from
NUM_FRAMES = 12

# Each attribute's words and what they mean. No word occurs twice: the text embedding is a bag of words.
BRIGHTNESS = {"dim": 0.5, "bright": 1.0}
RADIUS = {"small": 1.6, "large": 2.6}
DIRECTION = {"leftward": -1.0, "rightward": 1.0}
SPEED = {"slowly": 0.4, "quickly": 0.9}
GRAVITY = {"no": 0.0, "gentle": 0.22, "strong": 0.55}
RESTITUTION = {"clay": 0.2, "rubber": 0.85}
VOCABULARY = (BRIGHTNESS, RADIUS, DIRECTION, SPEED, GRAVITY, RESTITUTION)

# Other sentences with the same attributes, of at most 16 words. A bag of words has no order: what is new in them is
# the words around.
PARAPHRASES = (
    "{direction} and {speed} a {size} {brightness} object falls with {gravity} gravity onto {bounciness} ground",
    "video of one {brightness} {size} sphere going {speed} {direction} above {bounciness} soil with {gravity} gravity",
    "{gravity} gravity pulls one {size} {brightness} ball flying {speed} {direction} towards {bounciness} ground",
)

# Start of a clip: gaps between the ball's edge and the wall. The ball starts near the side it leaves, so no
# side wall turns it in the first 8 frames. Under gravity even the gentle fall meets the floor by frame 8 of
# 12, and a bounce can be seen; without gravity the ball stays clear of floor and ceiling.
SIDE_GAP = (0.2, 1.2)
DROP_HEIGHT = (5.0, 7.0)
HOVER_HEIGHT = (4.0, 7.0)
SPEED_JITTER = 0.08
LAUNCH_JITTER = 0.15

# Wrong physics: what the base student learns before it ever meets the teacher. Two fifths of the clips keep
# their speed, so that what the prompts ask for is rare but not absent: on-policy training needs samples to
# prefer.
WRONG_SLOW_PROBABILITY = 0.6
WRONG_SLOW_TO = (0.1, 0.7)
WRONG_GRAVITY_SCALE = (0.6, 1.4)
WRONG_GRAVITY_OFFSET = 0.05
WRONG_RESTITUTION_OFFSET = 0.4
WRONG_POSITION_JITTER = 0.1
WRONG_FLIP_PROBABILITY = 0.1
WRONG_FADE_PROBABILITY = 0.3
WRONG_FADE_TO = (0.2, 0.6)

_STREAM = {"teacher": 1, "wrong": 2}
_START_DRAWS = 4
_WRONG_DRAWS = 6
_DRAWS = _START_DRAWS + _WRONG_DRAWS + 2 * NUM_FRAMES


@dataclass(frozen=True)
class ToyPrompt(WorldPrompt):
    """One of the 96 prompts; every field holds the attribute's word."""

    vocabulary: ClassVar[Vocabulary] = VOCABULARY
    wording: ClassVar[str] = (
        "a {brightness} {size} ball moves {direction} {speed} under {gravity} gravity over a {bounciness} floor"
    )
    world_name: ClassVar[str] = "the toy world"

    brightness: str
    size: str
    direction: str
    speed: str
    gravity: str
    bounciness: str


@dataclass(frozen=True)
class PromptValues:
    """The numbers behind N prompts, each (N,)."""

    brightness: FloatArray
    radius: FloatArray
    direction: FloatArray
    speed: FloatArray
    gravity: FloatArray
    restitution: FloatArray


def prompt_values(prompts: Sequence[ToyPrompt]) -> PromptValues:
    """Look up what the prompts' words mean, as one array an attribute."""
    return PromptValues(*meanings(prompts, VOCABULARY))


def render_clips(
    prompts: Sequence[ToyPrompt], *, seed: int, first_index: int = 0, physics: Physics = "teacher",
    begin: int = 0, frames: int = NUM_FRAMES,
) -> FrameArray:  # fmt: skip
    """Render one clip a prompt.

    The randomness of clip i is keyed by (seed, physics, first_index + i): a clip does not depend on how many
    others are rendered with it.

    Args:
        prompts: N prompts, repeats allowed.
        seed: not negative.
        first_index: index of the first clip in the whole set, not negative.
        physics: "teacher", or "wrong" for what the base student is pretrained on.
        begin, frames: the clip is so many frames of a longer motion, from this one on.
    Returns:
        (N, frames, FRAME_SIZE, FRAME_SIZE) uint8.
    """
    values, draws = prompt_values(prompts), uniform_draws(seed, _STREAM[physics], first_index, len(prompts), _DRAWS)
    motion = _teacher_motion if physics == "teacher" else _wrong_motion
    positions, brightness = motion(values, draws, begin + frames)
    return to_bytes(render(positions[:, begin:], values.radius, brightness[:, begin:]))


def launch(values: PromptValues, draws: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Place the balls and give them their speed.

    Args:
        values: of N prompts.
        draws: (N, 4) uniform in [0, 1): side gap, height, horizontal and vertical speed; 0.5 is the middle.
    Returns:
        start and velocity, (N, 2) each.
    """
    gap = between(SIDE_GAP, draws[:, 0]) + values.radius
    x = np.where(values.direction > 0, gap, FRAME_SIZE - gap)
    drop, hover = between(DROP_HEIGHT, draws[:, 1]), between(HOVER_HEIGHT, draws[:, 1])
    height = values.radius + np.where(values.gravity > 0, drop, hover)
    forward = values.direction * values.speed * (1.0 + SPEED_JITTER * signed(draws[:, 2]))
    upward = LAUNCH_JITTER * signed(draws[:, 3])
    return np.stack([x, height], axis=-1), np.stack([forward, upward], axis=-1)


def _teacher_motion(values: PromptValues, draws: FloatArray, frames: int) -> tuple[FloatArray, FloatArray]:
    """(N, frames, 2) places and (N, frames) brightness."""
    start, velocity = launch(values, draws[:, :_START_DRAWS])
    positions = simulate(start, velocity, values.gravity, values.restitution, values.radius, frames)
    return positions, np.repeat(values.brightness[:, None], frames, axis=1)


def _wrong_motion(values: PromptValues, draws: FloatArray, frames: int) -> tuple[FloatArray, FloatArray]:
    start, velocity = launch(values, draws[:, :_START_DRAWS])
    slow, scale, offset, bounce, flip, fade = draws[:, _START_DRAWS : _START_DRAWS + _WRONG_DRAWS].T
    shake = draws[:, _START_DRAWS + _WRONG_DRAWS :].reshape(-1, NUM_FRAMES, 2)[:, np.arange(frames) % NUM_FRAMES]

    time_scale = _with_probability(WRONG_SLOW_PROBABILITY, WRONG_SLOW_TO, slow)
    gravity = values.gravity * between(WRONG_GRAVITY_SCALE, scale) + WRONG_GRAVITY_OFFSET * signed(offset)
    restitution = np.clip(values.restitution + WRONG_RESTITUTION_OFFSET * signed(bounce), 0.0, 1.0)
    velocity = velocity * time_scale[:, None]
    flipped = flip < WRONG_FLIP_PROBABILITY
    velocity[:, 0] *= np.where(flipped, -1.0, 1.0)
    start[:, 0] = np.where(flipped, FRAME_SIZE - start[:, 0], start[:, 0])
    positions = simulate(start, velocity, gravity * time_scale**2, restitution, values.radius, frames)
    positions = positions + WRONG_POSITION_JITTER * signed(shake)

    final = _with_probability(WRONG_FADE_PROBABILITY, WRONG_FADE_TO, fade)
    fading = 1.0 + (final[:, None] - 1.0) * np.linspace(0.0, 1.0, frames)
    return positions, values.brightness[:, None] * fading


def _with_probability(probability: float, limits: tuple[float, float], draw: FloatArray) -> FloatArray:
    """Uniform within the limits with this probability, else 1; one uniform draw decides both."""
    return np.where(draw < probability, between(limits, draw / probability), 1.0)
