"""The procedural teacher of the toy world: small grey clips of one ball under gravity.

A prompt fixes six attributes; the start and a little of the launch speed are random; from there the motion is
deterministic. Every attribute can be measured back from the pixels (`afd_scale.evaluation.suites.trajectory`),
except the bounciness of the floor where nothing falls.

Units: pixels and frames. A position is (x, height): x to the right and height upwards from the lower left.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
FrameArray = NDArray[np.uint8]
Physics = Literal["teacher", "wrong"]

WORLD_VERSION = 1  # of what is rendered; part of what shards were made from
NUM_FRAMES = 12
FRAME_SIZE = 16
SUBSTEPS_PER_FRAME = 8
WALL_RESTITUTION = 1.0

# Each attribute's words and what they mean. No word occurs twice: the text embedding is a bag of words.
BRIGHTNESS = {"dim": 0.5, "bright": 1.0}
RADIUS = {"small": 1.6, "large": 2.6}
DIRECTION = {"leftward": -1.0, "rightward": 1.0}
SPEED = {"slowly": 0.4, "quickly": 0.9}
GRAVITY = {"no": 0.0, "gentle": 0.22, "strong": 0.55}
RESTITUTION = {"clay": 0.2, "rubber": 0.85}
VOCABULARY = (BRIGHTNESS, RADIUS, DIRECTION, SPEED, GRAVITY, RESTITUTION)

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


@dataclass(frozen=True)
class ToyPrompt:
    """One of the 96 prompts; every field holds the attribute's word."""

    brightness: str
    size: str
    direction: str
    speed: str
    gravity: str
    bounciness: str

    def __post_init__(self) -> None:
        for (name, word), words in zip(vars(self).items(), VOCABULARY, strict=True):
            if word not in words:
                raise ValueError(f"{name} ({word!r}) must be one of {sorted(words)}: the world has no other.")

    @property
    def sentence(self) -> str:
        """The prompt as the student reads it."""
        return (
            f"a {self.brightness} {self.size} ball moves {self.direction} {self.speed} "
            f"under {self.gravity} gravity over a {self.bounciness} floor"
        )

    @property
    def prompt_id(self) -> str:
        """A stable name for files and tables."""
        return "-".join(astuple(self))


@dataclass(frozen=True)
class PromptValues:
    """The numbers behind N prompts, each (N,)."""

    brightness: FloatArray
    radius: FloatArray
    direction: FloatArray
    speed: FloatArray
    gravity: FloatArray
    restitution: FloatArray


def toy_prompts() -> tuple[ToyPrompt, ...]:
    """Return all 96 prompts, in a fixed order."""
    return tuple(ToyPrompt(*words) for words in itertools.product(*VOCABULARY))


def parse_prompt(sentence: str) -> ToyPrompt:
    """Return the prompt whose sentence this is.

    Raises:
        ValueError: the sentence is none of the 96.
    """
    for prompt in toy_prompts():
        if prompt.sentence == sentence:
            return prompt
    raise ValueError(
        f"prompt ({sentence!r}) must be a sentence of toy_prompts(), such as {toy_prompts()[0].sentence!r}: "
        "the procedural teacher renders nothing else."
    )


def prompt_values(prompts: Sequence[ToyPrompt]) -> PromptValues:
    """Look up what the prompts' words mean, as one array an attribute."""
    words = [astuple(prompt) for prompt in prompts]
    columns = (
        np.array([table[row[column]] for row in words], dtype=np.float64) for column, table in enumerate(VOCABULARY)
    )
    return PromptValues(*columns)


def simulate(
    start: FloatArray, velocity: FloatArray, gravity: FloatArray, restitution: FloatArray, radius: FloatArray
) -> FloatArray:
    """Let N balls fly and bounce between floor, ceiling and side walls.

    Args:
        start: (N, 2) centre at frame 0, pixels.
        velocity: (N, 2) at frame 0, pixels per frame.
        gravity: (N,) downward acceleration, pixels per frame squared.
        restitution: (N,) share of the vertical speed kept by a bounce off floor or ceiling.
        radius: (N,) pixels.
    Returns:
        (N, NUM_FRAMES, 2) centres.
    """
    position, velocity = start.copy(), velocity.copy()
    acceleration = np.stack([np.zeros_like(gravity), -gravity], axis=-1)
    kept = np.stack([np.full_like(restitution, WALL_RESTITUTION), restitution], axis=-1)
    lowest = radius[:, None]
    highest = FRAME_SIZE - lowest
    step = 1.0 / SUBSTEPS_PER_FRAME
    path = [position]
    for _ in range(NUM_FRAMES - 1):
        for _ in range(SUBSTEPS_PER_FRAME):
            position = position + velocity * step + acceleration * (0.5 * step**2)
            velocity = velocity + acceleration * step
            beyond = np.minimum(position - lowest, 0.0) + np.maximum(position - highest, 0.0)
            outward = beyond * velocity > 0
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


def ball_area(radius: FloatArray) -> FloatArray:
    """Sum of the pixels of a rendered ball of brightness 1: the disc and its one-pixel soft edge."""
    return math.pi * (radius**2 + 1.0 / 12.0)


def render_clips(
    prompts: Sequence[ToyPrompt], *, seed: int, first_index: int = 0, physics: Physics = "teacher"
) -> FrameArray:
    """Render one clip a prompt.

    The randomness of clip i is keyed by (seed, physics, first_index + i): a clip does not depend on how many
    others are rendered with it.

    Args:
        prompts: N prompts, repeats allowed.
        seed: not negative.
        first_index: index of the first clip in the whole set, not negative.
        physics: "teacher", or "wrong" for what the base student is pretrained on.
    Returns:
        (N, NUM_FRAMES, FRAME_SIZE, FRAME_SIZE) uint8.
    """
    values, draws = prompt_values(prompts), _uniform_draws(seed, _STREAM[physics], first_index, len(prompts))
    clips = _teacher_clips(values, draws) if physics == "teacher" else _wrong_clips(values, draws)
    return np.round(clips * 255.0).astype(np.uint8)


def launch(values: PromptValues, draws: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Place the balls and give them their speed.

    Args:
        values: of N prompts.
        draws: (N, 4) uniform in [0, 1): side gap, height, horizontal and vertical speed; 0.5 is the middle.
    Returns:
        start and velocity, (N, 2) each.
    """
    gap = _between(SIDE_GAP, draws[:, 0]) + values.radius
    x = np.where(values.direction > 0, gap, FRAME_SIZE - gap)
    drop, hover = _between(DROP_HEIGHT, draws[:, 1]), _between(HOVER_HEIGHT, draws[:, 1])
    height = values.radius + np.where(values.gravity > 0, drop, hover)
    forward = values.direction * values.speed * (1.0 + SPEED_JITTER * _signed(draws[:, 2]))
    upward = LAUNCH_JITTER * _signed(draws[:, 3])
    return np.stack([x, height], axis=-1), np.stack([forward, upward], axis=-1)


def _teacher_clips(values: PromptValues, draws: FloatArray) -> FloatArray:
    start, velocity = launch(values, draws[:, :_START_DRAWS])
    positions = simulate(start, velocity, values.gravity, values.restitution, values.radius)
    return render(positions, values.radius, np.repeat(values.brightness[:, None], NUM_FRAMES, axis=1))


def _wrong_clips(values: PromptValues, draws: FloatArray) -> FloatArray:
    start, velocity = launch(values, draws[:, :_START_DRAWS])
    slow, scale, offset, bounce, flip, fade = draws[:, _START_DRAWS : _START_DRAWS + _WRONG_DRAWS].T
    shake = draws[:, _START_DRAWS + _WRONG_DRAWS :].reshape(-1, NUM_FRAMES, 2)

    time_scale = _with_probability(WRONG_SLOW_PROBABILITY, WRONG_SLOW_TO, slow)
    gravity = values.gravity * _between(WRONG_GRAVITY_SCALE, scale) + WRONG_GRAVITY_OFFSET * _signed(offset)
    restitution = np.clip(values.restitution + WRONG_RESTITUTION_OFFSET * _signed(bounce), 0.0, 1.0)
    velocity = velocity * time_scale[:, None]
    flipped = flip < WRONG_FLIP_PROBABILITY
    velocity[:, 0] *= np.where(flipped, -1.0, 1.0)
    start[:, 0] = np.where(flipped, FRAME_SIZE - start[:, 0], start[:, 0])
    positions = simulate(start, velocity, gravity * time_scale**2, restitution, values.radius)
    positions = positions + WRONG_POSITION_JITTER * _signed(shake)

    final = _with_probability(WRONG_FADE_PROBABILITY, WRONG_FADE_TO, fade)
    fading = 1.0 + (final[:, None] - 1.0) * np.linspace(0.0, 1.0, NUM_FRAMES)
    return render(positions, values.radius, values.brightness[:, None] * fading)


def _uniform_draws(seed: int, stream: int, first_index: int, count: int) -> FloatArray:
    num_draws = _START_DRAWS + _WRONG_DRAWS + 2 * NUM_FRAMES
    draws = np.empty((count, num_draws))
    for row in range(count):
        sequence = np.random.SeedSequence((seed, stream, first_index + row))
        draws[row] = np.random.Generator(np.random.Philox(sequence)).random(num_draws)
    return draws


def _between(limits: tuple[float, float], draw: FloatArray) -> FloatArray:
    return limits[0] + (limits[1] - limits[0]) * draw


def _with_probability(probability: float, limits: tuple[float, float], draw: FloatArray) -> FloatArray:
    """Uniform within the limits with this probability, else 1; one uniform draw decides both."""
    return np.where(draw < probability, _between(limits, draw / probability), 1.0)


def _signed(draw: FloatArray) -> FloatArray:
    return 2.0 * draw - 1.0
