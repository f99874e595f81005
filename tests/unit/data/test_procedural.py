"""The toy teacher as a source: balance, determinism, what a clip becomes."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from afd_scale.config import ConfigError
from afd_scale.config.run import ProceduralSource
from afd_scale.data.teachers.procedural import ProceduralTeacher, form_of
from afd_scale.data.teachers.procedural import prompt_order as order_of
from afd_scale.data.worlds import WORLDS
from afd_scale.data.worlds.drop import ToyPrompt, render_clips

FORM = form_of("drop")


def prompt_order(clips: int, seed: int) -> list:
    return order_of(ToyPrompt.every(), clips, seed)


def test_every_prompt_comes_before_any_comes_again() -> None:
    order = prompt_order(250, seed=3)
    assert len(order) == 250
    for begin in (0, 96):
        assert set(order[begin : begin + 96]) == set(ToyPrompt.every())
    assert max(Counter(order[192:]).values()) == 1
    assert order[:96] != order[96:192], "each round has its own order"
    assert order[:96] != list(ToyPrompt.every()), "the start of a round must not favour one attribute"


def test_order_is_keyed_by_the_seed_and_does_not_depend_on_the_number_of_clips() -> None:
    assert prompt_order(100, seed=1) == prompt_order(300, seed=1)[:100]
    assert prompt_order(100, seed=1) != prompt_order(100, seed=2)


def test_frames_are_those_of_the_clips_position() -> None:
    source = ProceduralSource(clips=300, physics="wrong", seed=5)
    teacher = ProceduralTeacher(source)
    clips = teacher.clips()
    assert len(clips) == 300
    assert teacher.name == "procedural:wrong"
    for position in (270, 3):  # in the second rendered block, then back in the first
        clip, prompt = clips[position], prompt_order(300, seed=5)[position]
        assert (clip.prompt, clip.prompt_id, clip.index) == (prompt.sentence, prompt.prompt_id, position // 96)
        frames = teacher.frames(clip, FORM)
        expected = render_clips([prompt], seed=5, first_index=position, physics="wrong")[0]
        np.testing.assert_array_equal(frames[..., 0], expected)


def test_shorter_sources_are_prefixes_of_longer_ones() -> None:
    short, long = (ProceduralTeacher(ProceduralSource(clips=clips)) for clips in (10, 400))
    for one, other in zip(short.clips(), long.clips(), strict=False):
        assert one == other
        np.testing.assert_array_equal(short.frames(one, FORM), long.frames(other, FORM))


def test_no_other_form_is_rendered() -> None:
    teacher = ProceduralTeacher(ProceduralSource(clips=1))
    with pytest.raises(ConfigError, match="must be the toy world's"):
        teacher.frames(teacher.clips()[0], replace(FORM, frames=6))


@pytest.mark.parametrize("world", WORLDS)
def test_each_world_has_its_own_clips(world: str) -> None:
    source = ProceduralSource(world=world, clips=30, seed=4)
    teacher = ProceduralTeacher(source)
    clip = teacher.clips()[29]
    frames = teacher.frames(clip, form_of(world))
    expected = WORLDS[world].render([WORLDS[world].prompt.parse(clip.prompt)], seed=4, first_index=29)[0]
    assert frames.shape == (WORLDS[world].frames, 16, 16, 1)
    np.testing.assert_array_equal(frames[..., 0], expected)
    assert len({world.version for world in WORLDS.values()}) == len(WORLDS), "shards of two worlds are told apart"


def test_shards_of_the_first_world_are_still_what_they_were_made_from() -> None:
    expected = {"name": "procedural", "clips": 8, "physics": "teacher", "seed": 1, "world": 1}
    assert ProceduralTeacher(ProceduralSource(clips=8, seed=1)).provenance == expected


@pytest.mark.parametrize(("part", "count"), [("seen", 18), ("unseen", 6)])
def test_a_source_of_a_part_cycles_through_its_prompts_and_says_so(part: str, count: int) -> None:
    teacher = ProceduralTeacher(ProceduralSource(world="kick", clips=40, seed=2, prompts=part))
    clips = teacher.clips()
    assert {clip.prompt for clip in clips} == {prompt.sentence for prompt in WORLDS["kick"].part(part)}
    assert [clip.index for clip in clips] == [place // count for place in range(40)]
    assert teacher.provenance["prompts"] == part
    frames = teacher.frames(clips[20], form_of("kick"))
    expected = WORLDS["kick"].render([WORLDS["kick"].prompt.parse(clips[20].prompt)], seed=2, first_index=20)[0]
    np.testing.assert_array_equal(frames[..., 0], expected)


def test_clips_from_the_middle_of_a_motion_begin_at_frames_of_their_own() -> None:
    teacher = ProceduralTeacher(ProceduralSource(world="kick", clips=300, seed=5, begin=(3, 6)))
    assert teacher.provenance["begin"] == [3, 6], "shards are told apart"
    prompts, begins = order_of(WORLDS["kick"].prompt.every(), 300, 5), []
    for position in (*range(12), 270):  # the last one is of another rendered block
        frames = teacher.frames(teacher.clips()[position], form_of("kick"))[..., 0]
        (motion,) = WORLDS["kick"].render([prompts[position]], seed=5, first_index=position, frames=18 + 6)
        begins.append([begin for begin in range(7) if np.array_equal(motion[begin : begin + 18], frames)])
    assert all(len(found) == 1 for found in begins), begins
    assert {begin for (begin,) in begins} == {3, 4, 5, 6}
    with pytest.raises(ValueError, match=r"begin \(\[6, 3\]\) must not fall"):
        ProceduralSource(begin=(6, 3))


def test_a_source_may_leave_out_prompts_and_cut_into_motions() -> None:
    both = ProceduralSource(world="kick", clips=40, seed=2, prompts="seen", begin=(3, 6))
    teacher, whole = ProceduralTeacher(both), ProceduralTeacher(both.model_copy(update={"begin": None}))
    assert teacher.provenance == {**whole.provenance, "begin": [3, 6]}
    assert teacher.clips() == whole.clips(), "the same prompts, some of them left out"
    found = set()
    for clip in teacher.clips():
        frames = teacher.frames(clip, form_of("kick"))[..., 0]
        prompt = WORLDS["kick"].prompt.parse(clip.prompt)
        (motion,) = WORLDS["kick"].render([prompt], seed=2, first_index=int(clip.video), frames=18 + 6)
        found.add(next(begin for begin in range(7) if np.array_equal(motion[begin : begin + 18], frames)))
    assert found == {3, 4, 5, 6}
