"""Parts of long clips: what goes bad late is seen where it does, and the teacher passes at any time."""

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch

from afd_scale.config import RunConfig
from afd_scale.config.run import WORLD_OF
from afd_scale.data.worlds import WORLDS
from afd_scale.evaluation.lengths import by_span
from afd_scale.evaluation.suites import SUITES, Suite, Timing, parts_of
from afd_scale.evaluation.suites import world as world_suite
from afd_scale.mp4 import FrameArray
from afd_scale.types import Prompts

LENGTHS, CLIPS = 8, 96
SPANS = ["0-1x", "1-2x", "2-4x", "4-8x"]
Found = dict[str, dict[str, dict[str, float]]]


class World:
    """A suite with its prompts and long clips of the teacher."""

    def __init__(self, name: str) -> None:
        self.suite: Suite = SUITES[name](RunConfig.model_validate({"method": "sft"}))
        world = WORLDS[WORLD_OF[name]]
        texts = tuple(prompt.sentence for prompt in world.prompt.every())
        self.prompts = Prompts(texts, texts, tuple(range(len(texts))), torch.zeros(len(texts), 1, 1))
        self.frames = world.frames
        self.clips = self.suite.teacher(self.prompts, CLIPS, LENGTHS)

    def measured(self, **clips: FrameArray) -> Found:
        parts: dict[str, list[dict[str, float]]] = {name: [] for name in clips}
        for part in parts_of(self.frames, LENGTHS):
            for name, values in self.suite.measure_part(clips, self.prompts, Timing(8.0, ()), part).items():
                parts[name].append(values)
        return {name: by_span(own) for name, own in parts.items()}


@pytest.fixture(scope="module", params=["toy", "kick"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(world_suite, "REFERENCE_CLIPS", 192)
        patched.setattr(world_suite, "_kept_tracks", cache(world_suite.reference_tracks))
        yield World(request.param)


@pytest.fixture(scope="module")
def found(world: World) -> Found:
    clips, frames = world.clips, world.frames
    faded, frozen, gone = clips.copy(), clips.copy(), clips.copy()
    faded[:, frames:] //= 2
    frozen[:, 2 * frames :] = clips[:, 2 * frames - 1 : 2 * frames]
    gone[:, 4 * frames :] = 0
    return world.measured(teacher=clips, faded=faded, frozen=frozen, gone=gone)


def test_the_teacher_passes_at_any_time(world: World, found: Found) -> None:
    assert list(found["teacher"]) == SPANS
    for values in found["teacher"].values():
        assert list(values) == list(world.suite.over_time)
        assert values["dynamic_degree"] == pytest.approx(1, abs=0.08)
        assert values["trajectory_fd"] < 8  # of so few clips
        assert values["path_fd"] < 8
        for name in ("attributes_right", "brightness_right", "permanence", "sharp_fraction"):
            assert values.get(name, 1) > 0.97
        for name in ("acceleration_residual", "gravity_error", "gravity_error_sharp", "mass_error"):
            assert values.get(name, 0) < 0.04


def test_the_start_is_measured_as_a_clip_of_the_teachers_length(world: World, found: Found) -> None:
    clips = {"teacher": world.clips[:, : world.frames]}
    start = world.suite.measure(clips, world.prompts, Timing(8.0, ()))["teacher"]
    same = start.keys() & found["teacher"]["0-1x"].keys()
    assert {"trajectory_fd", "dynamic_degree"} < same
    for name in same:
        assert found["teacher"]["0-1x"][name] == pytest.approx(start[name], abs=0.02), name


def test_what_goes_bad_is_seen_from_when_it_does(world: World, found: Found) -> None:
    def differs(fault: str, name: str) -> list[bool]:
        """By span."""
        pairs = [(found[fault][span].get(name, np.nan), found["teacher"][span][name]) for span in SPANS]
        return [abs(value - teacher) > 0.02 * max(1, abs(teacher)) for value, teacher in pairs]

    bright = "attributes_right" if "attributes_right" in world.suite.over_time else "brightness_right"
    fall = "acceleration_residual" if "acceleration_residual" in world.suite.over_time else "gravity_error"
    assert differs("faded", bright) == [False, True, True, True]
    assert differs("frozen", "trajectory_fd") == [False, False, True, True]
    assert differs("frozen", "path_fd") == [False, False, True, True]
    assert differs("frozen", "dynamic_degree") == [False, False, True, True]
    assert differs("frozen", fall) == [False, False, True, True]
    assert differs("gone", fall) == [False, False, False, True]
    assert differs("gone", "trajectory_fd") == [False, False, False, True]


def test_balls_that_rest_say_nothing_about_gravity(world: World) -> None:
    resting = world.clips.copy()
    on_floor = next(number for number, text in enumerate(world.prompts.texts) if "strong" in text and "clay" in text)
    resting[:] = world.clips[on_floor : on_floor + 1, -1:]
    vanishing = resting.copy()
    vanishing[:, np.arange(vanishing.shape[1]) % world.frames >= world.frames // 2] = 0
    found = world.measured(student=resting, vanishing=vanishing)
    late, lost = found["student"]["4-8x"], found["vanishing"]["4-8x"]
    assert lost.get("acceleration_residual", lost.get("gravity_error", 0)) > 0.2, "no ball is no ball at rest"
    assert late.get("acceleration_residual", None) is None
    assert late.get("gravity_error", None) is None
    assert late["dynamic_degree"] == 0


def test_a_tremble_is_as_far_away_late_as_early(world: World) -> None:
    shift = np.random.default_rng(0).integers(-1, 2, (2, *world.clips.shape[:2]))
    rows, columns = np.arange(16)[:, None] + shift[0, ..., None, None], np.arange(16) + shift[1, ..., None, None]
    clip, frame = np.indices(world.clips.shape[:2])[..., None, None]
    trembling = world.clips[clip, frame, rows % 16, columns % 16]
    found = world.measured(student=trembling, teacher=world.clips)
    early, late = ({name: found["student"][span][name] - found["teacher"][span][name] for name in
                    ("trajectory_fd", "path_fd")} for span in ("0-1x", "4-8x"))  # fmt: skip
    assert late["path_fd"] == pytest.approx(early["path_fd"], rel=0.35)
    assert late["trajectory_fd"] > 1.15 * early["trajectory_fd"]


def test_drift_is_from_the_opening_of_the_whole_video() -> None:
    suite = SUITES["video"](RunConfig.model_validate({"method": "sft"}))
    clip = np.random.default_rng(0).integers(60, 200, (1, 1, 24, 32, 3)).astype(np.uint8).repeat(32, axis=1)
    clip[:, 16:] = clip[:, 16:] // 2  # darker at a border between two parts, and steady
    prompts = Prompts(("a",), ("a",), (0,), torch.zeros(1, 1, 1))
    timing = Timing(8.0, (4, 8, 12, 16, 20, 24, 28))
    first, second, third, fourth = (
        suite.measure_part({"student": clip}, prompts, timing, part)["student"] for part in parts_of(8, 4)
    )
    assert first["brightness_drift"] == second["brightness_drift"] == 0
    assert third["brightness_drift"] == pytest.approx(fourth["brightness_drift"])
    assert third["brightness_drift"] > 15
    alone = suite.measure({"student": clip[:, 16:24]}, prompts, Timing(8.0, (4,)))["student"]
    assert alone["brightness_drift"] == 0
    assert alone["border_jump"] == third["border_jump"], "borders are those of the part"
    assert {**alone, "brightness_drift": 0, "colour_drift": 0} == {**third, "brightness_drift": 0, "colour_drift": 0}
