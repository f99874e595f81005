"""The toy world: prompts, physics and rendering of the procedural teacher."""

import re

import numpy as np
import pytest

from afd_scale.data.worlds.ball import FRAME_SIZE, ball_area, render, simulate
from afd_scale.data.worlds.drop import (
    DROP_HEIGHT,
    NUM_FRAMES,
    VOCABULARY,
    ToyPrompt,
    prompt_values,
    render_clips,
)


def _fly(start, velocity, gravity=0.0, restitution=1.0, radius=1.5):
    """Path (NUM_FRAMES, 2) of one ball."""
    return simulate(
        np.array([start], dtype=float),
        np.array([velocity], dtype=float),
        np.array([gravity]),
        np.array([restitution]),
        np.array([radius]),
        NUM_FRAMES,
    )[0]


def test_prompts_are_all_combinations_and_parse_back():
    prompts = ToyPrompt.every()
    assert len(prompts) == 96
    assert len({prompt.sentence for prompt in prompts}) == 96
    assert len({prompt.prompt_id for prompt in prompts}) == 96
    assert [ToyPrompt.parse(prompt.sentence) for prompt in prompts] == list(prompts)


def test_each_attribute_value_has_its_own_word():
    words = [word for table in VOCABULARY for word in table]
    assert len(words) == len(set(words)) == 13
    bags = {frozenset(prompt.sentence.split()) for prompt in ToyPrompt.every()}
    assert len(bags) == 96
    frame = re.sub("|".join(rf"\b{word}\b" for word in words), "", ToyPrompt.every()[0].sentence)
    assert not set(frame.split()) & set(words)


def test_unknown_prompts_are_refused():
    with pytest.raises(ValueError, match=r"prompt \('a red ball'\) must be"):
        ToyPrompt.parse("a red ball")
    with pytest.raises(ValueError, match=r"speed \('fast'\) must be one of"):
        ToyPrompt("dim", "small", "leftward", "fast", "no", "clay")


def test_prompt_values_look_up_every_word():
    values = prompt_values([ToyPrompt("bright", "large", "leftward", "quickly", "strong", "rubber")])
    read = {name: float(value[0]) for name, value in vars(values).items()}
    assert read == {
        "brightness": 1.0,
        "radius": 2.6,
        "direction": -1.0,
        "speed": 0.9,
        "gravity": 0.55,
        "restitution": 0.85,
    }


def test_free_flight_is_the_exact_parabola():
    path = _fly(start=(2.0, 12.0), velocity=(0.5, 0.4), gravity=0.1)
    frames = np.arange(NUM_FRAMES)
    np.testing.assert_allclose(path[:, 0], 2.0 + 0.5 * frames)
    np.testing.assert_allclose(path[:, 1], 12.0 + 0.4 * frames - 0.05 * frames**2)


def test_side_wall_turns_the_ball_and_keeps_its_speed():
    # The wall is at 16 - 1.5 = 14.5: reached after 2.5 frames, then back.
    path = _fly(start=(12.0, 8.0), velocity=(1.0, 0.0))
    np.testing.assert_allclose(path[:6, 0], [12.0, 13.0, 14.0, 14.0, 13.0, 12.0])


def test_floor_keeps_the_asked_share_of_speed():
    # Without gravity and 2 pixels above the floor: down at 1, up again at 0.5 from frame 2.
    path = _fly(start=(8.0, 3.5), velocity=(0.0, -1.0), restitution=0.5)
    np.testing.assert_allclose(path[:5, 1], [3.5, 2.5, 1.5, 2.0, 2.5])


def test_rebound_height_is_restitution_squared_of_the_drop():
    path = _fly(start=(8.0, 7.5), velocity=(0.0, 0.0), gravity=0.8, restitution=0.7)
    bounced = path[5:10, 1].max()
    assert bounced == pytest.approx(1.5 + 0.7**2 * 6.0, abs=0.35)


def test_render_draws_the_ball_where_it_is():
    frame = render(np.array([[[4.0, 13.0]]]), np.array([2.0]), np.array([[0.5]]))[0, 0]
    assert frame.shape == (FRAME_SIZE, FRAME_SIZE)
    assert frame.max() == 0.5
    rows, columns = np.nonzero(frame)
    assert columns.mean() + 0.5 == pytest.approx(4.0)
    assert FRAME_SIZE - rows.mean() - 0.5 == pytest.approx(13.0)
    assert frame.sum() == pytest.approx(0.5 * ball_area(np.array(2.0)), rel=0.03)


@pytest.mark.parametrize("physics", ["teacher", "wrong"])
def test_a_clip_does_not_depend_on_its_company(physics):
    prompts = list(ToyPrompt.every()) * 6  # more than one block of rendering
    together = render_clips(prompts, seed=3, physics=physics)
    assert together.shape == (576, NUM_FRAMES, FRAME_SIZE, FRAME_SIZE)
    assert together.dtype == np.uint8
    for index in (0, 95, 511, 512, 575):
        alone = render_clips([prompts[index]], seed=3, first_index=index, physics=physics)
        np.testing.assert_array_equal(alone[0], together[index])


def test_seed_index_and_physics_each_change_the_clip():
    prompt = [ToyPrompt.every()[40]]
    clips = [
        render_clips(prompt, seed=0),
        render_clips(prompt, seed=1),
        render_clips(prompt, seed=0, first_index=1),
        render_clips(prompt, seed=0, physics="wrong"),
    ]
    for index, clip in enumerate(clips):
        for other in clips[:index]:
            assert (clip != other).any()


def test_teacher_and_wrong_clips_start_independently():
    prompts = [prompt for prompt in ToyPrompt.every() if prompt.gravity == "no"] * 8
    heights = []
    for physics in ("teacher", "wrong"):
        rows = render_clips(prompts, seed=0, physics=physics)[:, 0].astype(float).sum(axis=2)
        heights.append((rows * np.arange(FRAME_SIZE)).sum(axis=1) / rows.sum(axis=1))
    assert abs(np.corrcoef(heights)[0, 1]) < 0.4


@pytest.mark.parametrize("physics", ["teacher", "wrong"])
def test_the_whole_ball_stays_in_the_frame(physics):
    prompts = list(ToyPrompt.every()) * 2
    values = prompt_values(prompts)
    frames = render_clips(prompts, seed=7, physics=physics).astype(float) / 255.0
    area = frames.sum(axis=(2, 3)) / frames.max(axis=(2, 3))
    np.testing.assert_allclose(area / ball_area(values.radius)[:, None], 1.0, atol=0.08)


def test_without_gravity_the_teachers_ball_never_nears_the_floor():
    prompts = [prompt for prompt in ToyPrompt.every() if prompt.gravity == "no"] * 4
    frames = render_clips(prompts, seed=1)
    assert frames[:, :, -1].max() == 0


def test_under_gravity_the_teachers_ball_reaches_the_floor():
    prompts = [prompt for prompt in ToyPrompt.every() if prompt.gravity != "no"] * 4
    frames = render_clips(prompts, seed=1)
    lowest_lit_row = np.where(frames.any(axis=3), np.arange(FRAME_SIZE), 0).max(axis=2)
    assert (lowest_lit_row[:, 0] <= FRAME_SIZE - DROP_HEIGHT[0]).all()
    # A bounce falls between two frames: what counts is that the ball came within one frame of the floor.
    assert (lowest_lit_row.max(axis=1) >= FRAME_SIZE - 3).all()


def test_wrong_clips_are_wrong_in_the_stated_shares():
    prompts = [prompt for prompt in ToyPrompt.every() if prompt.direction == "rightward"] * 20
    frames = render_clips(prompts, seed=2, physics="wrong").astype(float)
    mass = frames.sum(axis=(2, 3))
    faded = mass[:, -1] / mass[:, 0] < 0.7
    starts_left = frames[:, 0, :, : FRAME_SIZE // 2].sum(axis=(1, 2)) > mass[:, 0] / 2
    assert faded.mean() == pytest.approx(0.30, abs=0.05)
    assert (~starts_left).mean() == pytest.approx(0.10, abs=0.03)
