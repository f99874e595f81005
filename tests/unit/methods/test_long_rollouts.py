"""Rollouts longer than the teacher's videos: which window is kept, what the student is given with it, means by time."""

import math
from dataclasses import replace

import pytest
import torch

from afd_scale.config.methods.long_rollouts import LongRolloutsConfig
from afd_scale.flow.randomness import Randomness
from afd_scale.flow.schedule import TIMESTEPS
from afd_scale.methods.long_rollouts import Times, drawn_length, drawn_starts, roll_out, teacher_windows
from afd_scale.types import Batch, Place
from tests.networks import make_videos
from tests.unit.methods.engines import SHAPE, Oracle, build, make_batch
from tests.unit.methods.test_passes import check

CONV = {"name": "conv", "channels": 4, "identity_patch": (2, 1)}
LONG = {"frames": 10, "early_share": 0.5}
TWO_LAYERS = {"num_layers": 2}


def make_afd(discriminator=None, *, sampler=None, student=None, micro_batch=None, **fields):
    """Windows of 2 latent frames of rollouts of 10, a chunk each; a chunk sees the sink, the one before it, itself."""
    method = {
        "name": "afd", "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.0}, "prior_weight": 0.0,
        "rollouts_per_prompt": 3, "advantage": {"clip": 1.0}, "policy_mix": 1.0, "old_policy_decay": 0.7,
        "discriminator": CONV, "long_rollouts": LONG,
    }  # fmt: skip
    replaced = {"discriminator": discriminator} if discriminator else {}
    return build(method | fields, student=student, sampler={"window_frames": 3, "sink_frames": 1} | (sampler or {}),
                 micro_batch=micro_batch, **replaced)  # fmt: skip


def whole_rollouts(afd, batch, step, length=10):
    """What the policy generates for the same prompts and noise, and the noisy latents of each chunk's last step."""
    rows = batch.prompts.repeat(3)
    noise = afd.sampler.stream(
        afd.randomness, "rollout", step, rows.keys, SHAPE[1:], torch.device("cpu"), frames=length
    )  # fmt: skip
    noisy, clean = zip(*afd.sampler.last_steps(afd.old_policy, rows.embeddings, noise), strict=True)
    return torch.cat(noisy, dim=1), torch.cat(clean, dim=1)


def test_of_a_rollout_the_window_and_what_it_sees_are_kept():
    afd, batch = make_afd(micro_batch=4), make_batch((4, 9, 11))
    seen = set()
    for step in range(1, 9):
        windows = afd._roll_out(batch.prompts, batch.teacher, step)
        _, clean = whole_rollouts(afd, batch, step)
        starts = [place.first_frame for place in windows.places]
        assert starts[::3] == starts[1::3] == starts[2::3], "a prompt's are of one time"
        seen |= set(starts)
        for row, place in enumerate(windows.places):
            torch.testing.assert_close(windows.latents[row], clean[row, place.first_frame : place.first_frame + 2])
            expected = [0] * (place.first_frame > 1) + [place.first_frame - 1] * (place.first_frame > 0)
            torch.testing.assert_close(place.context, clean[row, expected])
    assert len(seen) > 4
    assert 0 in seen


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("sampler", [
    {}, {"positions": "window", "window_frames": 2, "sink_frames": 0}, {"positions": "window", "window_frames": 10},
], ids=str)  # fmt: skip
@pytest.mark.parametrize(("student", "context"), [({}, None), (TWO_LAYERS, 2)])
def test_the_update_sees_what_the_sampler_saw(student, context, sampler, joint):
    """Its velocities, given the sampler's noisy inputs, are those of the sampler's cached passes: with the context of
    one window for one layer, of two for two."""
    long = LONG | {"context_frames": context}
    afd = make_afd(student=student, sampler=sampler, long_rollouts=long, context_gradient=joint)
    batch = make_batch((4, 9, 11))
    for step in range(1, 5):
        windows = afd._roll_out(batch.prompts, batch.teacher, step)
        noisy, clean = whole_rollouts(afd, batch, step)
        states = afd._noise(windows, step, 0)
        starts = [place.first_frame for place in windows.places]
        inputs = torch.stack([noisy[row, start : start + 2] for row, start in enumerate(starts)])
        levels = torch.full_like(states.sigma, float(afd.sampler.sigmas[-1]))
        states = replace(states, latents=inputs, sigma=levels)
        for first in range(0, len(windows), 3):  # a prompt's at once
            rows = slice(first, first + 3)
            velocity = states[rows].velocity(afd.student, windows[rows], clean_gradient=joint)
            x0 = inputs[rows] - levels[rows][..., None, None, None] * velocity
            expected = torch.stack([clean[row, starts[row] : starts[row] + 2] for row in range(first, first + 3)])
            torch.testing.assert_close(x0.detach(), expected, rtol=1e-4, atol=1e-4)
        (*_, (arguments, options, _)) = afd.student.calls
        assert options["first_frame"] == starts[-1]
        torch.testing.assert_close(arguments[1], levels[-3:] * TIMESTEPS)


def test_the_loss_is_on_the_windows_frames_alone():
    afd, batch = make_afd(), make_batch()
    afd.train_step(batch, 1)
    for arguments, options, velocity in afd.student.calls:
        assert arguments[0].shape[1] == velocity.shape[1] == 2
        assert options["clean"].shape[1] in (2, 3, 4)


VARIANTS = [{}, {"prior_weight": 1e-4, "states_per_rollout": 2}, {"student_rollouts": 2}, {"reuse_logits": True},
            {"taught": "resampled"}, {"judged_frames": 1, "context_gradient": True}, {"inner_updates": 2}]  # fmt: skip


@pytest.mark.parametrize(("micro_batch", "extra"), [(None, 1), (2, 0)])
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_long_afd_runs_what_it_declares(fields, micro_batch, extra):
    afd = make_afd(micro_batch=micro_batch, **fields)
    prompts = make_batch((4, 9, 20)).teacher.prompts
    batch = Batch(make_batch((4, 9)).teacher, prompts[2 : 2 + extra])
    check(afd, batch, micro_batch, afd.sampler.config.calls(10))


@pytest.mark.parametrize("fields", [{}, {"judged_frames": 1, "taught": "resampled"}], ids=str)
def test_the_reward_of_a_frozen_judge_rises_at_all_times(fields):
    afd = make_afd(Oracle(lambda videos: videos.latents.mean(dim=(1, 2, 3, 4))), **fields)
    found = [afd.train_step(make_batch((2 * step, 2 * step + 1)), step) for step in range(1, 41)]
    for time in ("1x", "4x"):
        rewards = [each[f"rollout/reward_mean/{time}"] for each in found if f"rollout/reward_mean/{time}" in each]
        assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1, time


def test_rollouts_do_not_depend_on_the_batch_that_they_are_in():
    afd = make_afd()
    together, apart = (
        [afd._roll_out(batch.prompts, batch.teacher, 3) for batch in map(make_batch, samples)]
        for samples in ([(4, 9, 11)], [(11,), (4, 9)])
    )
    joined = apart[1] + apart[0]
    torch.testing.assert_close(together[0].latents, joined.latents, rtol=1e-4, atol=1e-4)
    assert [place.first_frame for place in together[0].places] == [place.first_frame for place in joined.places]


def test_memory_does_not_grow_with_the_length():
    def kept(length):
        afd = make_afd(long_rollouts={"frames": length, "early_share": 0.0})
        sizes, chunks = [], afd.sampler.chunks

        def watched(policy, text, noise):
            new_cache, caches = policy.engine.network.new_cache, []
            policy.engine.network.new_cache = lambda frames: caches.append(new_cache(frames)) or caches[-1]
            yield from chunks(policy, text, noise)
            sizes.append(caches[0].layers[0].k_BLND.shape)
            del policy.engine.network.new_cache

        afd.sampler.chunks = watched
        batch = make_batch()
        windows = afd._roll_out(batch.prompts, batch.teacher, 1)
        sizes.append(windows.latents.untyped_storage().nbytes())
        sizes += [max(place.context.untyped_storage().nbytes() for place in windows.places)]
        return sizes

    assert kept(10) == kept(60)


def test_lengths_and_places_are_drawn_as_the_config_says():
    randomness = Randomness(0)
    grows = LongRolloutsConfig.model_validate({"frames": 24, "from_frames": 6, "growth_steps": 10})
    early = {drawn_length(grows, randomness, step, 3, 6) for step in range(-3, 1)}
    late = [drawn_length(grows, randomness, step, 3, 6) for step in range(10, 200)]
    assert early == {6}
    assert set(late) == {6, 9, 12, 15, 18, 21, 24}
    assert max(drawn_length(grows, randomness, 5, 3, 6) for _ in range(9)) <= 15
    assert drawn_length(LongRolloutsConfig(frames=24), randomness, 1, 3, 6) == 24
    starts = drawn_starts(0.3, randomness, 1, range(4000), 6)
    assert set(starts) == set(range(7))
    assert starts.count(0) / 4000 == pytest.approx(0.3 + 0.7 / 7, abs=0.03)
    assert starts.count(6) / 4000 == pytest.approx(0.7 / 7, abs=0.03)
    assert drawn_starts(0.3, randomness, 1, [7, 5], 6) == [starts[7], starts[5]]


def test_the_teachers_first_window_meets_the_rollouts_first():
    clips = make_videos(torch.arange(6.0).expand(40, 6)[:, :, None, None, None], torch.zeros(40, 1, 1))
    rollouts = make_videos(torch.zeros(80, 2, 1, 1, 1), torch.zeros(80, 1, 1))
    places = [Place(0 if row < 20 else 8, torch.zeros(0, 1, 1, 1)) for row in range(80)]
    rollouts = replace(rollouts, places=tuple(places))
    begins = teacher_windows(clips, rollouts, Randomness(0), 1, 2).latents[:, 0].flatten().tolist()
    assert begins[:10] == [0.0] * 10
    assert set(begins[10:]) == {2.0, 4.0}
    whole = replace(rollouts, latents=torch.zeros(80, 6, 1, 1, 1))
    assert teacher_windows(clips, whole, Randomness(0), 1, 2) is clips


def test_means_by_time():
    times = Times(LongRolloutsConfig(frames=24), 6, lambda x: x)
    rollouts = make_videos(torch.zeros(8, 4, 1, 1, 1), torch.zeros(8, 1, 1))
    places = [Place(first, torch.zeros(0, 1, 1, 1)) for first in (0, 0, 4, 4, 5, 5, 20, 20)]  # middles 2, 6, 7, 22
    means = times.means("accuracy", torch.tensor([1.0, 0.0, 0.25, 0.5]), replace(rollouts, places=tuple(places)))
    assert {name: float(value) for name, value in means.items()} == {
        "accuracy/1x": 0.5, "accuracy/2x": 0.25, "accuracy/4x": 0.5
    }  # fmt: skip
    assert times.means("accuracy", torch.zeros(8), rollouts) == {}


def test_accuracy_by_time_is_the_judges():
    afd = make_afd(Oracle(lambda videos: torch.tensor([3.0, 1.0] + [2.0] * 6)[: len(videos)]))
    teacher = make_batch().teacher

    def times_and_metrics(step):
        windows = afd._roll_out(teacher.prompts, teacher, step)
        middles = [place.first_frame + 1 for place in windows.places[::3]]
        times = [2 ** max(0, math.ceil(math.log2(middle / 2))) for middle in middles]
        return times, afd.jury.hear(teacher, windows, afd.randomness, step, 100)[0]

    found = [times_and_metrics(step) for step in range(1, 7)]
    assert any(len(set(times)) == 2 for times, _ in found), "none of two times"
    for (early, late), metrics in found:
        told = {early: 0.5} if early == late else {early: 1.0, late: 0.0}
        for time in (1, 2, 4, 8):
            name = f"discriminator/accuracy/{time}x"
            assert float(metrics.get(name, -1)) == told.get(time, -1)


@pytest.mark.parametrize(
    ("fields", "sampler", "message"),
    [
        ({"long_rollouts": {"frames": 2}}, {}, r"method.long_rollouts.frames \(2\) must be whole chunks"),
        ({"long_rollouts": {"frames": 9}}, {"chunk_frames": 2, "window_frames": 4, "sink_frames": 0}, r"\(9\) must be"),
        ({"long_rollouts": {"frames": 8, "context_frames": 2}}, {"window_frames": None, "sink_frames": 0},
         r"context_frames \(2\) must be whole chunks"),
        ({"advantage": {"baseline": "batch"}}, {}, r"advantage.baseline \(batch\) must be group with long_rollouts"),
        ({"long_rollouts": LONG | {"from_frames": 12, "growth_steps": 9}}, {}, r"from_frames \(12\) must be at most"),
        ({"long_rollouts": LONG | {"from_frames": 4}}, {}, r"growth_steps \(None\) must be given with from_frames"),
        ({}, {"positions": "window"}, r"sampler.positions \(window\) must be absolute with sampler.sink_frames "
         r"\(1\) where method.long_rollouts.frames \(10\) exceed sampler.window_frames \(3\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(fields, sampler, message):
    with pytest.raises(ValueError, match=message):
        make_afd(sampler=sampler, **fields)


def test_without_a_window_all_is_context():
    afd, batch = make_afd(sampler={"window_frames": None, "sink_frames": 0}), make_batch()
    windows = roll_out(afd.old_policy, afd.sampler, afd.config, batch.prompts, batch.teacher, afd.randomness, 1)
    assert all(len(place.context) == place.first_frame for place in windows.places)
    assert afd.train_step(batch, 1)["student/old_policy_distance"] == 0
