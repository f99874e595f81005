"""The world of kicks: what its prompts fix, and what chance decides."""

import numpy as np
import pytest

from afd_scale.codecs.identity import IdentityCodec
from afd_scale.data.worlds.ball import Turns, simulate
from afd_scale.data.worlds.kick import KICK_FRAMES, NUM_FRAMES, VOCABULARY, KickPrompt, render_clips
from afd_scale.evaluation.suites.kick import measured_gravity
from afd_scale.evaluation.suites.tracks import track

PROMPTS = list(KickPrompt.every()) * 8


def test_prompts_are_all_combinations_that_the_student_can_read() -> None:
    every = KickPrompt.every()
    assert len({prompt.sentence for prompt in every}) == len({prompt.prompt_id for prompt in every}) == 24
    assert [KickPrompt.parse(prompt.sentence) for prompt in every] == list(every)
    words = [word for table in VOCABULARY for word in table]
    assert len(words) == len(set(words))
    for prompt in KickPrompt.every():
        IdentityCodec(3, 4).embed(prompt.sentence)
    with pytest.raises(ValueError, match="must be a sentence of the world of kicks"):
        KickPrompt.parse("a ball")


def test_a_clip_depends_on_its_own_number_alone() -> None:
    clips = render_clips(PROMPTS, seed=1)
    np.testing.assert_array_equal(clips[7:9], render_clips(PROMPTS[7:9], seed=1, first_index=7))
    assert not np.array_equal(clips[:24], render_clips(PROMPTS[:24], seed=1, physics="wrong"))


def test_a_clip_may_be_cut_out_of_a_longer_motion() -> None:
    long = render_clips(PROMPTS[:24], seed=1, frames=3 * NUM_FRAMES)
    np.testing.assert_array_equal(long[:, :NUM_FRAMES], render_clips(PROMPTS[:24], seed=1))
    np.testing.assert_array_equal(long[:, 20:38], render_clips(PROMPTS[:24], seed=1, begin=20))


def test_the_teacher_falls_as_its_prompt_says_and_weak_clips_mostly_do_not() -> None:
    asked = np.array([VOCABULARY[2][prompt.gravity] for prompt in PROMPTS])
    for physics, share in (("teacher", 1.0), ("wrong", 0.3)):
        fall, is_measured = measured_gravity(track(render_clips(PROMPTS, seed=2, physics=physics)))
        right = np.abs(fall - asked)[is_measured] < 0.01
        assert is_measured.mean() > 0.95
        assert right.mean() == pytest.approx(share, abs=0.1)


def test_the_direction_is_the_prompts_until_the_kick_and_anyones_after_it() -> None:
    paths = track(render_clips(PROMPTS, seed=3)).position[..., 0]
    side = np.array([VOCABULARY[1][prompt.direction] for prompt in PROMPTS])
    before, after = paths[:, KICK_FRAMES[0] - 1] - paths[:, 0], paths[:, -1] - paths[:, KICK_FRAMES[1]]
    assert (np.sign(before) == side).all()
    assert 0.3 < (np.sign(after) == side).mean() < 0.7


def test_a_kick_and_a_rough_floor_turn_the_horizontal_speed_alone() -> None:
    turns = Turns(np.array([1.0]), np.array([-0.5]), np.array([[0.25]]))
    start, velocity = np.array([[8.0, 4.0]]), np.array([[0.5, -1.0]])
    path = simulate(start, velocity, np.zeros(1), np.ones(1), np.ones(1), 6, turns)[0]
    np.testing.assert_allclose(path[:, 0], [8.0, 8.5, 8.0, 7.5, 7.75, 8.0], atol=0.1)  # kicked at 1, bounces at 3
    np.testing.assert_allclose(path[:, 1], [4.0, 3.0, 2.0, 1.0, 2.0, 3.0], atol=1e-9)
