"""Which clips of two sides are compared, and in which form."""

from fractions import Fraction
from types import SimpleNamespace

import pytest

from afd_scale.codecs.codec import VideoForm
from afd_scale.data.clips import Clip
from afd_scale.data.teachers.prompts import prompt_id_of
from afd_scale.data.video import own_form, same_rate
from afd_scale.evaluation.clip_sets import chosen_clips, common_form, same_prompts
from afd_scale.evaluation.video import write_mp4
from tests.videos import moving_bar


def side(*prompts):
    clips = [Clip(str(number), prompt, prompt_id_of(prompt), 0) for number, prompt in enumerate(prompts)]
    return SimpleNamespace(clips=clips)


@pytest.mark.parametrize(
    ("source", "teacher", "most", "chosen"),
    [
        ("abcdef", "c", 9, ("c", "c")),
        ("c", "abcdef", 9, ("c", "c")),
        ("abcx", "ybca", 9, ("abc", "bca")),
        ("aabb", "aaab", 3, ("aba", "aba")),  # the first of each prompt before any second
        ("abcde", "edcba", 3, ("ace", "eca")),
        ("ab", "cde", 2, ("ab", "ce")),  # none is shared
    ],
)
def test_where_prompts_are_shared_these_alone_are_compared(source, teacher, most, chosen):
    found = chosen_clips(side(*source), side(*teacher), most)
    assert tuple("".join(clip.prompt for clip in clips) for clips in found) == chosen
    assert same_prompts(*found) == (set(chosen[0]) == set(chosen[1]))


def test_prompts_are_the_same_if_neither_side_has_others():
    few, many = side("a").clips, side("a", "b").clips
    assert not same_prompts(few, many)
    assert not same_prompts(many, few)


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), Fraction(30000, 1001), Fraction(60000, 1001)])
def test_ntsc_rates_survive_a_file(tmp_path, rate):
    write_mp4(moving_bar(30, 16, 16), tmp_path / "clip.mp4", float(rate))
    assert own_form(tmp_path / "clip.mp4").fps == float(rate)


def test_rates_that_are_one_but_for_rounding_are_one():
    assert same_rate(19001 / 634, 30000 / 1001)
    assert not same_rate(30, 30000 / 1001)
    forms = [VideoForm(3000, rate, 16, 16) for rate in (30000 / 1001, 29.97)]
    for first, second in (forms, forms[::-1]):
        assert common_form(SimpleNamespace(form=first), SimpleNamespace(form=second)).frames == 3000
