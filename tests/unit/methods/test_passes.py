"""What a method says that a step runs, its passes, is what a step runs."""

import pytest
import torch

from afd_scale.config.cast import Load
from afd_scale.types import Batch
from tests.unit.methods.engines import SHAPE, STUDENT, build, make_batch

SAMPLER = {"first_chunk_timesteps": [1000, 750, 500]}
GAN = {
    "name": "gan",
    "rollouts_per_prompt": 2,
    "discriminator": {"name": "conv", "channels": 4, "identity_patch": (2, 1)},
}
SCORE = STUDENT | {"prediction": "velocity"}
DMD = {"name": "dmd", "student_every": 1, "fake_score": SCORE, "discriminator": GAN["discriminator"]}
CONV = {"name": "conv", "channels": 4, "identity_patch": (2, 1)}
AFD = {
    "name": "afd", "rollouts_per_prompt": 3, "prior_weight": 0.0,
    "discriminator": {"name": "conv", "channels": 4, "identity_patch": (2, 1)},
}  # fmt: skip
FULL = {"prior_weight": 1e-4, "r1_weight": 1.0, "states_per_rollout": 2, "context_gradient": True}
VARIANTS = [{}, {"prior_weight": 1e-4}, {"r1_weight": 1.0}, {"r2_weight": 1.0}, {"states_per_rollout": 2},
            {"context_gradient": True}, FULL, {"reuse_logits": True}, {"trained_rollouts": 2, "r1_weight": 1.0},
            {"inner_updates": 2}, {"judged_frames": 1},
            {"judged_frames": 1, "judged_windows": 2, "judges": {"second": CONV}},
            {"student_rollouts": 2, "prior_weight": 1e-4},
            {"credit": "regression"}, {"taught": "resampled", "student_rollouts": 2}, {"step_target": 0.1},
            {"discriminator": CONV | {"mismatch_weight": 0.5, "r1_weight": 1.0}},
            {"discriminator": CONV | {"freeze_after": 1}},
            {"judges": {"second": CONV}, "reuse_logits": True},
            {"judges": {"fixed": {"name": "http", "url": "http://scorer/"}}}]  # fmt: skip


def batch_with(extra: int) -> Batch:
    prompts = make_batch((4, 9, 20)).teacher.prompts
    return Batch(make_batch((4, 9)).teacher, prompts[2 : 2 + extra])


def calls_of(method, batch: Batch, step: int = 1):
    """(role, kind, gradient, of what passes through alone, frames seen, videos, states, gradient through the context)
    of each call of a network in a step."""
    calls = []

    def watch(role: str):
        def seen(_, arguments, options, output):
            rows, states, context, of_input, frames = len(arguments[0]), 1, False, False, None
            if "cache" in options:
                kind = "rollout"
            elif "clean" in options:
                kind, states, rows = "velocity", rows // len(options["clean"]), len(options["clean"])
                context = output.requires_grad and options.get("clean_gradient", True)
            elif len(arguments) == 3:
                kind = "bidirectional"
            else:
                kind, of_input = "score", arguments[0].latents.requires_grad
                frames = arguments[0].latents.shape[1]
            calls.append((role, kind, output.requires_grad, of_input, frames, rows, states, context))

        return seen

    for role, engine in method.engines.items():
        engine.network.register_forward_hook(watch(role), with_kwargs=True)
    method.train_step(batch, step)
    return calls


def ran(calls, passes_of_a_rollout: int):
    """(videos, at once, runs, states, gradient through the context) by (role, kind, gradient, of what passes through
    alone, frames seen), in the step's order."""
    found = {}
    for key in dict.fromkeys(call[:5] for call in calls):
        rows = [call[5] for call in calls if call[:5] == key]
        ((states, context),) = {call[6:] for call in calls if call[:5] == key}
        times = passes_of_a_rollout if key[1] == "rollout" else 1
        found[key] = (sum(rows) / times, max(rows), len(rows) / times, states, context)
    return list(found.items())


def declared(passes, frames_of_a_video: int = SHAPE[0]):
    """The same; passes of one kind are one, and as long as the longest."""
    found = {}
    for each in passes:
        frames = (each.frames or frames_of_a_video) if each.kind == "score" else None
        key = (each.role, each.kind, each.gradient, each.of_input, frames)
        videos, at_once, runs, *_ = found.get(key, (0, 0, 0))
        at_once = max(at_once, each.at_once)
        found[key] = (videos + each.videos, at_once, runs + each.runs, each.states, each.context_gradient)
    return list(found.items())


def check(method, batch: Batch, micro_batch: int | None, passes_of_a_rollout: int = 1, start_frames: int = 0):
    load = Load(len(batch.teacher), len(batch.extra), micro_batch, start_frames)
    said = declared(method.config.passes(load), batch.teacher.latents.shape[1])
    assert dict(ran(calls_of(method, batch), passes_of_a_rollout)) == dict(said)


@pytest.mark.parametrize(("micro_batch", "extra"), [(None, 0), (2, 0), (4, 1)])
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_afd_runs_what_it_declares(fields, micro_batch, extra):
    afd = build(AFD | fields, sampler=SAMPLER, micro_batch=micro_batch)
    if "fixed" in afd.engines:  # nobody is asked over the net
        afd.engines["fixed"].network.forward = lambda videos: videos.latents.flatten(1).mean(1)
    check(afd, batch_with(extra), micro_batch, afd.sampler.config.calls(SHAPE[0]))


@pytest.mark.parametrize("micro_batch", [None, 1, 3])
@pytest.mark.parametrize("fields", [{}, {"discriminator_objective": "softplus"}, {"r2_weight": 1.0, "ema_decay": 0.9}])
def test_gan_runs_what_it_declares(fields, micro_batch):
    gan = build(GAN | fields, sampler=SAMPLER | {"timesteps": [500], "first_chunk_timesteps": None},
                micro_batch=micro_batch)  # fmt: skip
    check(gan, batch_with(0), micro_batch, gan.sampler.config.calls(SHAPE[0]))


@pytest.mark.parametrize(("micro_batch", "extra"), [(None, 0), (2, 1)])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"fake_score": SCORE | {"causal": True}, "guidance_scale": 1.0},
        {"real_score": SCORE | {"causal": True}, "rollouts_per_prompt": 2},
        {"gan_weight": 0.1, "rollouts_per_prompt": 2, "r1_weight": 0.1, "ema_decay": 0.9},
    ],
    ids=str,
)
def test_dmd_runs_what_it_declares(fields, micro_batch, extra):
    dmd = build(DMD | fields, sampler=SAMPLER | {"timesteps": [500], "first_chunk_timesteps": None},
                micro_batch=micro_batch)  # fmt: skip
    check(dmd, batch_with(extra), micro_batch, dmd.sampler.config.calls(SHAPE[0]))


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_sft_runs_what_it_declares(micro_batch, ema_decay):
    sft = build({"name": "sft", "ema_decay": ema_decay}, micro_batch=micro_batch)
    check(sft, make_batch(range(5)), micro_batch)


def test_videos_that_a_step_keeps():
    """2 prompts with a teacher's video and 1 without, 3 rollouts each."""
    (rollout, trained, scored, *velocities) = build(AFD | FULL).config.passes(Load(2, 1))
    assert rollout.held == trained.held == scored.held == 2 + 9
    assert [each.held for each in velocities] == [2 + 9 * (1 + 3 * 2)] * 3  # noisy, and two frozen velocities
    (*_, student) = build(AFD | {"states_per_rollout": 2}).config.passes(Load(2, 1))
    assert student.held == 2 + 9 * (1 + 2 * 2)  # no reference's velocity


def test_a_frozen_judge_runs_its_question_alone():
    afd, batch = build(AFD | {"discriminator": CONV | {"freeze_after": 1}}, sampler=SAMPLER), batch_with(1)
    load = Load(len(batch.teacher), len(batch.extra))
    later = [each for each in afd.config.passes(load) if each.last is None]
    assert [each.role for each in afd.config.passes(load) if each.last == 1] == ["discriminator"]
    found = ran(calls_of(afd, batch, step=2), afd.sampler.config.calls(SHAPE[0]))
    assert dict(found) == dict(declared(later))


def test_extra_prompts_train_the_student_and_not_the_discriminator():
    batch = batch_with(1)
    afd = build(AFD)
    afd.train_step(batch, 1)
    (((trained,), _, _), ((scored,), _, _)) = afd.engines["discriminator"].calls
    teacher, rollouts = batch.teacher.prompts.keys, batch.prompts.repeat(3).keys
    assert trained.prompts.keys == teacher + batch.teacher.prompts.repeat(3).keys
    assert torch.equal(trained.latents[:2], batch.teacher.latents)
    assert scored.prompts.keys == rollouts
    assert torch.equal(trained.latents[2:], scored.latents[: 2 * 3])
    ((arguments, options, _),) = afd.student.calls
    assert torch.equal(options["clean"], scored.latents)
    assert torch.equal(arguments[2], batch.prompts.embeddings.repeat_interleave(3, dim=0))
