"""Fit the gravity probe: fresh clips of the world of kicks at every step, with the faults of students' clips.

A clip's answer is the gravity that it was rendered with. No clip is made for a prompt, and no path is read from pixels.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from afd_scale.data.worlds.ball import FRAME_SIZE, BoolArray, FloatArray, FrameArray, between, render, to_bytes
from afd_scale.data.worlds.kick import (
    BRIGHTNESS,
    GRAVITY,
    NUM_DRAWS,
    NUM_FRAMES,
    RADIUS,
    KickPrompt,
    fly,
    prompt_values,
    render_clips,
)
from afd_scale.evaluation.suites.gravity_probe import GravityProbe, probed_gravity

GRAVITIES = (-0.15, 0.35)
RESTITUTIONS = (0.0, 1.2)
BRIGHTNESSES = (0.9 * min(BRIGHTNESS.values()), max(BRIGHTNESS.values()))
RADII = (RADIUS - 0.3, RADIUS + 0.3)  # of faulty clips
LATEST_BEGIN = 4  # frames of the motion that a clip may leave out: the quickest ball still falls after them

CLEAN_SHARE = 0.25
LEVEL_SHARE = 0.08  # of clips whose ball keeps one height and so does not fall; half of these balls stand still
EMPTY_SHARE = 0.01  # likewise, without a ball
FAULT_SHARE = 0.4  # of the clips that are not clean, for each fault by itself
BLUR_ACROSS, BLUR_UPRIGHT = (0.3, 2.5), (0.3, 1.5)  # pixels; who cannot know where a ball goes smears it across
NOISE = (0.0, 0.06)
JITTER = (0.0, 0.15)  # pixels
FADED = (0.35, 1.0)  # brightness that is left at the end
MOST_MISSING = 2  # frames

CLIPS_A_STEP = 256
LEARNING_RATE, WEIGHT_DECAY = 4e-3, 1e-3
FEWEST_STEPS = 20  # a tenth of them warm up
HUBER = 0.02  # pixels per frame squared: errors beyond count by their size, not by its square
HELD_OUT_SEED, HELD_OUT_CLIPS = 1_000_005, 4096
BINS = (-0.15, -0.05, 0.05, 0.15, 0.25, 0.35)


@dataclass(frozen=True)
class FallingClips:
    """N clips and what falls in them.

    Attributes:
        clips: (N, NUM_FRAMES, FRAME_SIZE, FRAME_SIZE).
        gravity: (N,) downwards, pixels per frame squared.
    """

    clips: FrameArray
    gravity: FloatArray


def falling_clips(count: int, random: np.random.Generator, *, faults: bool) -> FallingClips:
    """Render balls of any gravity, bounciness and brightness.

    Args:
        faults: as students' clips have them, in all but CLEAN_SHARE of the clips; without, all are as the teacher's.
    """
    gravity, brightness = between(GRAVITIES, random.random(count)), between(BRIGHTNESSES, random.random(count))
    path = _paths(gravity, random)
    if not faults:
        levels = render(path, np.full(count, RADIUS), np.repeat(brightness[:, None], NUM_FRAMES, axis=1))
        return FallingClips(to_bytes(levels), gravity)

    is_level, is_empty = random.random(count) < LEVEL_SHARE, random.random(count) < EMPTY_SHARE
    one_place = path[np.arange(count), random.integers(0, NUM_FRAMES, count), None]
    path[..., 1] = np.where(is_level[:, None], one_place[..., 1], path[..., 1])
    stands = is_level & (random.random(count) < 0.5)
    path[..., 0] = np.where(stands[:, None], one_place[..., 0], path[..., 0])

    is_faulty = random.random(count) >= CLEAN_SHARE
    radius = np.where(is_faulty, between(RADII, random.random(count)), RADIUS)
    shaken = _some(is_faulty, random) * between(JITTER, random.random(count))
    path = path + shaken[:, None, None] * random.standard_normal(path.shape)
    left = np.where(_some(is_faulty, random), between(FADED, random.random(count)), 1.0)
    fading = brightness[:, None] * (1 - (1 - left[:, None]) * np.linspace(0, 1, NUM_FRAMES))
    fading[is_empty] = 0.0
    levels = _with_faults(render(path, radius, fading), is_faulty, random)
    return FallingClips(to_bytes(levels.clip(0.0, 1.0)), np.where(is_level | is_empty, 0.0, gravity))


def fit(steps: int, seed: int, on_step: Callable[[int, int], object]) -> GravityProbe:
    """A probe after so many steps on fresh clips, its weights rounded to half precision as they are kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = GravityProbe()
    optimizer = torch.optim.AdamW(probe.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        shown = falling_clips(CLIPS_A_STEP, np.random.default_rng((seed, step)), faults=True)
        answer = probe(torch.from_numpy(shown.clips).float() / 255)
        loss = nn.functional.huber_loss(answer, torch.from_numpy(shown.gravity).float(), delta=HUBER)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        on_step(step + 1, steps)
    return probe.half().float().eval()


def held_out_errors(probe: GravityProbe | None = None) -> dict[str, dict[str, float]]:
    """Mean absolute errors on clips that no fit has seen, pixels per frame squared.

    Args:
        probe: None is the one of the package.
    Returns:
        Of `clean` and `degraded` clips of any gravity, by the gravity in them; of the `teacher`'s, by the word of the
        prompt. `all` is the mean over all clips.
    """
    found = {}
    for name, faults in (("clean", False), ("degraded", True)):
        shown = falling_clips(HELD_OUT_CLIPS, np.random.default_rng((HELD_OUT_SEED, faults)), faults=faults)
        bins = [f"{low} to {high}" for low, high in pairwise(BINS)]
        kinds = [bins[at] for at in np.digitize(shown.gravity, BINS[1:-1])]
        found[name] = _by(kinds, bins, np.abs(probed_gravity(shown.clips, probe) - shown.gravity))
    asked = KickPrompt.every() * (HELD_OUT_CLIPS // len(KickPrompt.every()))
    wrong = np.abs(probed_gravity(render_clips(asked, seed=HELD_OUT_SEED), probe) - prompt_values(asked).gravity)
    return found | {"teacher": _by([prompt.gravity for prompt in asked], GRAVITY, wrong)}


def _paths(gravity: FloatArray, random: np.random.Generator) -> FloatArray:
    """(N, NUM_FRAMES, 2) centres, each cut out of a motion that began up to LATEST_BEGIN frames before."""
    count = len(gravity)
    direction, restitution = random.choice([-1.0, 1.0], count), between(RESTITUTIONS, random.random(count))
    whole = fly(direction, gravity, restitution, random.random((count, NUM_DRAWS)), LATEST_BEGIN + NUM_FRAMES)
    shown = random.integers(0, LATEST_BEGIN + 1, (count, 1)) + np.arange(NUM_FRAMES)
    return np.take_along_axis(whole, shown[..., None], axis=1)


def _with_faults(levels: FloatArray, is_faulty: BoolArray, random: np.random.Generator) -> FloatArray:
    """Levels (N, T, H, W) of which the faulty ones are smeared, torn and noisy."""
    frames = levels.shape[1]
    # Two futures at once: they go different ways, and fall alike.
    both_ways = _some(is_faulty, random)
    levels[both_ways] = (levels[both_ways] + levels[both_ways, :, :, ::-1]) / 2
    blurred = _some(is_faulty, random)
    across = _smear(between(BLUR_ACROSS, random.random(blurred.sum())))
    upright = _smear(between(BLUR_UPRIGHT, random.random(blurred.sum())))
    levels[blurred] = upright @ levels[blurred] @ across
    for _ in range(MOST_MISSING):
        torn = np.flatnonzero(_some(is_faulty, random))
        levels[torn, random.integers(0, frames, len(torn))] = 0.0
    noisy = np.flatnonzero(_some(is_faulty, random))
    noise = between(NOISE, random.random(len(noisy)))
    shape = (len(noisy), *levels.shape[1:])
    levels[noisy] += noise[:, None, None, None] * random.standard_normal(shape, dtype=np.float32)
    return levels


def _some(of: BoolArray, random: np.random.Generator) -> BoolArray:
    return np.asarray(of & (random.random(len(of)) < FAULT_SHARE))


def _smear(width: FloatArray) -> FloatArray:
    """(N, 1, FRAME_SIZE, FRAME_SIZE) matrices that spread a pixel over its line, by Gaussians of N widths."""
    between_pixels = np.subtract.outer(np.arange(FRAME_SIZE), np.arange(FRAME_SIZE))
    spread = np.exp(-(between_pixels**2) / (2 * width[:, None, None, None] ** 2))
    return np.asarray(spread / spread.sum(axis=-1, keepdims=True))


def _by(kinds: Sequence[str], names: Iterable[str], errors: FloatArray) -> dict[str, float]:
    """Means of all N errors, and of those of each kind."""
    means = {name: float(errors[[kind == name for kind in kinds]].mean()) for name in names}
    return {"all": float(errors.mean())} | means
