"""The toy teacher as a source: balance, determinism, what a clip becomes."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from afd_scale.config import ConfigError
from afd_scale.config.run import ProceduralSource
from afd_scale.data.teachers.procedural import FORM, ProceduralTeacher, prompt_order
from afd_scale.data.toy_world import render_clips, toy_prompts


def test_every_prompt_comes_before_any_comes_again() -> None:
    order = prompt_order(250, seed=3)
    assert len(order) == 250
    for begin in (0, 96):
        assert set(order[begin : begin + 96]) == set(toy_prompts())
    assert max(Counter(order[192:]).values()) == 1
    assert order[:96] != order[96:192], "each round has its own order"
    assert order[:96] != list(toy_prompts()), "the start of a round must not favour one attribute"


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
