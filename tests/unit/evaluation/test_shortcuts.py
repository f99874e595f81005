"""What is planted is found by its own probe and named; where nothing is, nothing is found."""

import itertools
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from afd_scale.data.worlds.drop import ToyPrompt, render_clips
from afd_scale.evaluation.linear_probe import _relabelled, probe_traits
from afd_scale.evaluation.shortcuts import LEAST_CLIPS, Finding, probe, probe_measured, warnings
from afd_scale.evaluation.traits import traits_of

Clip = NDArray[np.uint8]
CLIPS, FRAMES, HEIGHT, WIDTH = 32, 12, 48, 64
BEYOND_CHANCE = ("gives away", "slight")
PROMPTS = [f"prompt {number}" for number in range(CLIPS)]


def textured(seed: int, count: int = CLIPS) -> list[Clip]:
    """Clips of a random texture each, of its own brightness and contrast, that slides in its own direction."""
    clips = []
    for number in range(count):
        random = np.random.default_rng((seed, number))
        coarse = random.normal(size=(24, 32, 3)).astype(np.float32)
        world = cv2.resize(coarse, (WIDTH + 30, HEIGHT + 30), interpolation=cv2.INTER_CUBIC)
        world = world * random.uniform(20, 45) + random.uniform(90, 160) + 8 * random.normal(size=3)
        start, speed = 15 + random.uniform(0, 1, 2), random.uniform(-1.2, 1.2, 2)
        places = [start + time * speed for time in range(FRAMES)]
        frames = [cv2.warpAffine(world, np.float32([[1, 0, -x], [0, 1, -y]]), (WIDTH, HEIGHT)) for x, y in places]
        clips.append(np.clip(np.stack(frames), 0, 255).round().astype(np.uint8))
    return clips


@pytest.fixture(scope="module")
def teacher() -> list[Clip]:
    return textured(1)


@pytest.fixture(scope="module")
def other() -> list[Clip]:
    return textured(2)


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def watermark(clip: Clip) -> Clip:
    """A chequered patch, half transparent, at the lower right."""
    patch = 255.0 * (np.indices((6, 12)).sum(axis=0) % 4 < 2)[..., None]
    clip[:, 38:44, 50:62] = 0.5 * clip[:, 38:44, 50:62] + 0.5 * patch
    return clip


def black_bars(clip: Clip) -> Clip:
    clip[:, :3] = 0
    clip[:, :, -2:] = 0
    return clip


def dark_line(clip: Clip) -> Clip:
    clip[:, :, 0] //= 2
    return clip


def bright_start(clip: Clip) -> Clip:
    clip[0] = np.clip(clip[0].astype(int) + 6, 0, 255)
    return clip


def noise(clip: Clip) -> Clip:
    random = np.random.default_rng(int(clip.astype(int).sum()))
    return np.clip(clip + 3 * random.normal(size=clip.shape), 0, 255).astype(np.uint8)


def blur(clip: Clip) -> Clip:
    return np.stack([cv2.GaussianBlur(frame, (0, 0), 0.9) for frame in clip])


def late(clip: Clip) -> Clip:
    return np.concatenate([np.repeat(clip[:1], 3, axis=0), clip[:-3]])


def red(clip: Clip) -> Clip:
    clip[..., 0] = np.clip(clip[..., 0].astype(int) + 40, 0, 255)
    return clip


@pytest.mark.parametrize(
    ("plant", "name", "said"),
    [
        (watermark, "watermark", "rows 38-43, columns 50-61 (bottom right)"),
        (black_bars, "borders", "crop 3 pixels at the top, 2 pixels at the right of both sides"),
        (dark_line, "borders", "crop 1 pixel at the left of both sides"),
        (bright_start, "first frame", "+6.0 levels of 255 off the second at the teacher"),
        (noise, "noise", "to the other side"),
        (blur, "sharpness", "the other side's edges are"),
        (late, "timing", "trim 3 frames from the start of the teacher's"),
        (red, "colour", "red +36"),
    ],
)
def test_what_is_planted_is_found_and_named(
    teacher: list[Clip], other: list[Clip], plant: Callable[[Clip], Clip], name: str, said: str
) -> None:
    findings = probe([plant(clip.copy()) for clip in teacher], other, PROMPTS, PROMPTS)
    found = by_name(findings)[name]
    assert found.verdict == "gives away"
    assert found.accuracy is not None
    assert found.chance is not None
    assert found.accuracy > max(0.85, found.chance)
    assert said in found.remedy
    assert found.accuracy >= max(finding.accuracy or 0 for finding in findings) - 0.15, "no other probe is far ahead"


def test_a_planted_thing_of_the_other_side_is_named_as_its(teacher: list[Clip], other: list[Clip]) -> None:
    found = by_name(probe(teacher, [watermark(clip.copy()) for clip in other], PROMPTS, PROMPTS))["watermark"]
    assert found.verdict == "gives away"
    assert found.remedy.startswith("100 % of the other side's clips")


def test_what_both_sides_have_gives_nothing_away(teacher: list[Clip], other: list[Clip]) -> None:
    sides = ([watermark(black_bars(clip.copy())) for clip in side] for side in (teacher, other))
    assert not [finding for finding in probe(*sides, PROMPTS, PROMPTS) if finding.verdict in BEYOND_CHANCE]


def test_a_patch_does_not_pass_for_blur_or_noise(teacher: list[Clip], other: list[Clip]) -> None:
    found = by_name(probe([watermark(clip.copy()) for clip in teacher], other, PROMPTS, PROMPTS))
    assert [name for name, finding in found.items() if finding.verdict in BEYOND_CHANCE] == ["watermark"]


@pytest.mark.parametrize("paired", [True, False])
def test_two_halves_of_one_set_find_nothing(paired: bool) -> None:
    """Five divisions, eight probes each: chance alone passes one in a thousand."""
    traits = [traits_of(clip) for clip in textured(3, 2 * CLIPS)]
    beyond = []
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(2 * CLIPS)
        halves = ([traits[place] for place in half] for half in (order[:CLIPS], order[CLIPS:]))
        findings = probe_measured(*halves, *((PROMPTS, PROMPTS) if paired else (None, None)))
        beyond += [finding for finding in findings if finding.verdict != "no"]
    assert len(beyond) <= 1, beyond


def test_two_seeds_of_the_toy_teacher_are_one() -> None:
    prompts = ToyPrompt.every()
    sentences = [prompt.sentence for prompt in prompts]
    sides = (list(render_clips(prompts, seed=seed)) for seed in (1, 2))
    findings = probe(*sides, sentences, sentences)
    assert not [finding for finding in findings if finding.verdict in BEYOND_CHANCE]
    assert {finding.name for finding in findings} >= {"colour", "watermark", "timing"}


def test_it_says_the_same_every_time(teacher: list[Clip], other: list[Clip]) -> None:
    first, second = (probe(teacher[:20], other[:20]) for _ in range(2))
    assert first == second


def test_few_clips_get_no_verdict(teacher: list[Clip], other: list[Clip]) -> None:
    few = [black_bars(clip.copy()) for clip in teacher[: LEAST_CLIPS - 1]]
    findings = probe(few, other)
    assert {finding.verdict for finding in findings} == {"cannot tell"}
    assert findings[0].remedy == "15 different clips on a side: 16 are needed"


def test_a_clip_that_comes_again_is_one_clip(teacher: list[Clip], other: list[Clip]) -> None:
    again = [black_bars(clip.copy()) for clip in teacher[:4]] * 8
    assert {finding.verdict for finding in probe(again, other, PROMPTS, PROMPTS)} == {"cannot tell"}


def test_sides_of_two_prompts_get_no_verdict(teacher: list[Clip], other: list[Clip]) -> None:
    """All that differs may be what was asked for."""
    bars = [black_bars(clip.copy()) for clip in teacher]
    found = by_name(probe(bars, other, ["a"] * CLIPS, ["b"] * CLIPS))["borders"]
    assert (found.verdict, found.chance) == ("cannot tell", 1)
    assert "compare clips of the same prompts" in found.remedy


def test_another_form_is_stated(teacher: list[Clip], other: list[Clip]) -> None:
    findings = probe([clip[:-2, :, :-4] for clip in teacher], other, PROMPTS, PROMPTS)
    assert (findings[0].name, findings[0].verdict, findings[0].accuracy) == ("form", "differs", None)
    assert "frames 10 against 12, size 48x60 against 48x64" in findings[0].remedy
    assert "watermark" not in by_name(findings)


def test_warnings_are_lines_for_the_log(teacher: list[Clip], other: list[Clip]) -> None:
    base = np.stack(other)
    assert warnings(np.stack(teacher), base, PROMPTS) == []
    lines = warnings(np.stack([watermark(clip.copy()) for clip in teacher]), base, PROMPTS)
    assert len(lines) == 1
    assert lines[0].startswith("shortcut: watermark (gives away) tells teacher from base in 100% of unseen clips, ")
    assert "mask or crop that region of both sides" in lines[0]
    assert "4 clips a side" in warnings(np.stack(teacher[:4]), base[:4], PROMPTS[:4])[0]


@pytest.mark.parametrize(
    "clip", [np.zeros((2, 16, 16), np.uint8), np.zeros((3, 16, 16)), np.zeros((5, 3, 9), np.uint8)]
)
def test_clips_of_another_kind_are_refused(clip: Clip) -> None:
    with pytest.raises(ValueError, match=r"clip \(.*\) must be uint8 \(T, H, W\)"):
        traits_of(clip)


def test_a_side_must_have_clips(teacher: list[Clip]) -> None:
    with pytest.raises(ValueError, match=r"clips \(32 of the teacher, 0 others\)"):
        probe(teacher, [])


@pytest.mark.parametrize("shape", [(3, 4, 4), (12, 16, 16), (5, 4, 40, 3), (4, 33, 7, 1)])
def test_traits_of_any_shape_are_finite(shape: tuple[int, ...]) -> None:
    for clip in (np.zeros(shape, np.uint8), np.random.default_rng(0).integers(0, 256, shape, np.uint8)):
        traits = traits_of(clip)
        assert all(np.isfinite(value) for group in traits.values.values() for value in group.values())
        assert np.isfinite(traits.still).all()


def test_a_probe_sees_a_line_and_not_chance() -> None:
    random = np.random.default_rng(0)
    labels, traits = np.arange(40) < 20, random.normal(size=(40, 5))
    assert probe_traits(traits, labels, range(40)).accuracy < 0.75
    traits[:, 2] += 4 * labels
    found = probe_traits(traits, labels, range(40))
    assert found.accuracy > 0.95 > found.chance > 0.6
    assert 0 < found.standard_error < 0.1


def test_a_prompt_that_is_recognised_is_no_side_that_is() -> None:
    """Ten prompts a side, five clips each that are nearly alike: other clips of a prompt must not tell its side."""
    random = np.random.default_rng(0)
    prompts = np.repeat(np.arange(20), 5)
    traits = random.normal(size=(20, 12))[prompts] + 0.01 * random.normal(size=(100, 12))
    found = probe_traits(traits, prompts < 10, prompts.tolist())
    assert found.accuracy < 0.7
    assert found.accuracy < found.chance
    assert probe_traits(traits, prompts < 10, range(100)).accuracy > 0.8


def test_random_labels_are_exchanged_within_a_prompt_and_between_prompts_of_one_side() -> None:
    labels = np.array([1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1], bool)
    groups = np.array([0, 0, 0, 1, 1, 2, 3, 3, 4, 5, 5, 5])  # a prompt of both sides, two of each, and one of both
    drawn = {tuple(row) for row in _relabelled(labels, groups, np.random.default_rng(0), 500).T.tolist()}
    assert {(sum(row[:3]), sum(row[-3:])) for row in drawn} == {(1, 2)}
    assert {row[3:-3] for row in drawn} == {
        tuple(np.repeat(sides, (2, 1, 2, 1)).tolist()) for sides in itertools.product([True, False], repeat=4)
        if sum(sides) == 2
    }  # fmt: skip
    assert len(drawn) == 3 * 6 * 3


def test_chance_knows_what_random_labels_reach() -> None:
    """Of many sets without a difference, hardly any passes; and half of them would pass a coin's 0.5."""
    passed = told = 0
    for seed in range(40):
        random = np.random.default_rng(seed)
        found = probe_traits(random.normal(size=(32, 6)), np.arange(32) < 16, range(32))
        passed += found.accuracy > found.chance
        told += found.accuracy > 0.5
    assert passed <= 1
    assert told > 8


def test_sides_of_other_sizes_count_the_same() -> None:
    random = np.random.default_rng(1)
    labels = np.arange(120) < 20
    found = probe_traits(random.normal(size=(120, 3)), labels, range(120))
    assert found.accuracy < found.chance, "to call everything the larger side is no knowledge"
    half_told = np.where(labels & (np.arange(120) % 2 == 0), 5.0, 0.1 * random.normal(size=120))[:, None]
    assert probe_traits(half_told, labels, range(120)).accuracy == 0.75
