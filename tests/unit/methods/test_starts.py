"""Starts of the teacher's videos, which the student is given: rollouts begin with them, nothing is learned of them."""

from dataclasses import replace

import pytest
import torch

from afd_scale.config.cast import Load, Pass
from afd_scale.config.methods.sft import SftConfig
from afd_scale.flow.process import x0_from_velocity
from afd_scale.methods.self_rollout import roll_out
from tests.unit.methods.engines import SHAPE, Oracle, build, make_batch
from tests.unit.methods.test_gan import Brightness
from tests.unit.methods.test_passes import AFD, DMD, GAN, SCORE, check

FRAMES, START = 6, 2
CAUSAL = {"fake_score": SCORE | {"causal": True}}
METHODS = {
    "afd": AFD | {"prior_weight": 1e-4, "states_per_rollout": 2},
    "afd joint": AFD | {"context_gradient": True},
    "afd windows": AFD | {"judged_frames": 4},
    "afd chunks": AFD | {"judged_frames": 4, "judged_windows": 2},
    "gan": GAN,
    "dmd": DMD | {"gan_weight": 0.1},
    "dmd causal": DMD | CAUSAL | {"real_score": SCORE | {"causal": True}},
    "dmd mixed": DMD | CAUSAL | {"real_score": SCORE},
    "sft": {"name": "sft", "ema_decay": 0.9},
}  # fmt: skip
SAMPLER = {"chunk_frames": 2, "timesteps": [1000, 500], "first_chunk_timesteps": [1000, 800, 700]}
SHORT, LONG = ({"chunk_frames": size, "first_chunk_frames": START} for size in (1, 4))  # behind the start
LAYOUTS = [{}, {"window_frames": 4}, {"window_frames": 4, "sink_frames": 2}, SHORT, LONG,
           SHORT | {"window_frames": 4, "sink_frames": 3}]  # fmt: skip


def make(method, *, start=START, sampler=None, **options):
    """Of a name above, or of a section."""
    section = METHODS[method] if isinstance(method, str) else method
    return build(section, sampler=SAMPLER | (sampler or {}),
                 data={"latent_frames": FRAMES, "start_frames": start}, **options)  # fmt: skip


def batch_of(samples=(4, 9), **options):
    return make_batch(samples, frames=FRAMES, **options)


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_rollouts_begin_with_the_teachers_frames_of_their_prompts(micro_batch):
    afd, batch = make("afd", micro_batch=micro_batch), batch_of()
    rollouts = afd._roll_out(batch.prompts, batch.teacher, 1)
    given = batch.teacher.latents[:, :START].repeat_interleave(3, dim=0)
    assert torch.equal(rollouts.latents[:, :START], given)
    free = make("afd", start=0)._roll_out(batch.prompts, batch.teacher, 1)
    assert (rollouts.latents[:, START:] - free.latents[:, START:]).abs().max() > 1e-3, "they lead elsewhere"
    gan = make("gan", micro_batch=micro_batch)
    prompts = batch.prompts.repeat(2)
    rollouts = roll_out(gan.student, gan.sampler, prompts, batch.teacher, gan.randomness, 1, START)
    assert torch.equal(rollouts.videos.latents[:, :START], given.unflatten(0, (2, 3))[:, :2].flatten(0, 1))
    assert rollouts.noisy.shape[1] == rollouts.sigma.shape[1] == FRAMES - START


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("sampler", LAYOUTS, ids=str)
def test_the_update_sees_what_the_sampler_saw(sampler, joint):
    """The student's velocities of the sampler's noisy inputs are those of its cached passes."""
    afd, batch = make("afd joint", sampler=sampler, student={"num_layers": 2}), batch_of()
    rollouts = afd._roll_out(batch.prompts, batch.teacher, 1)
    rows = batch.prompts.repeat(3)
    noise = afd.sampler.draw(
        afd.randomness, "rollout", 1, rows.keys, (FRAMES, *SHAPE[1:]), torch.device("cpu"),
        given=batch.teacher.start(START, 3, slice(None)),
    )  # fmt: skip
    seen, _ = zip(*afd.sampler.last_steps(afd.old_policy, rows.embeddings, noise), strict=True)
    generated = rollouts.after(START)
    states = afd._noise(generated, 1, 0)
    level = float(afd.sampler.sigmas[-1])
    states = replace(states, latents=torch.cat(seen, dim=1)[:, START:], sigma=torch.full_like(states.sigma, level))
    velocity = states.velocity(afd.student, generated, clean_gradient=joint).detach()
    x0 = x0_from_velocity(states.latents, velocity, states.sigma)
    torch.testing.assert_close(x0, rollouts.latents[:, START:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("start", [0, START])
@pytest.mark.parametrize("sampler", [{}, SHORT, LONG], ids=str)
@pytest.mark.parametrize("method", ["gan", "dmd", "dmd causal"])
def test_the_pass_with_gradient_predicts_the_rollout(method, sampler, start, step):
    metrics = make(method, sampler=sampler, start=start).train_step(batch_of(), step)
    assert metrics["student/rollout_distance"] < 1e-5


@pytest.mark.parametrize("sampler", [SHORT, LONG], ids=str)
@pytest.mark.parametrize("method", ["afd", "sft", "dmd causal"])
def test_a_chunk_has_one_level(method, sampler):
    made = make(method, sampler=sampler)
    made.train_step(batch_of(range(6)), 1)
    network = made.fake_score if method == "dmd causal" else made.student
    (_, timestep, _), *_ = next(call for call in network.calls if "clean" in call[1])
    assert ({len(row.unique()) for row in timestep} == {1}) == (sampler is LONG), "a chunk, or four of them"


@pytest.mark.parametrize("method", METHODS)
def test_students_and_scores_are_asked_for_what_is_generated(method):
    made = make(method)
    made.train_step(batch_of(), 1)
    asked = 0
    for role, engine in made.engines.items():
        for arguments, options, velocity in getattr(engine, "calls", []):
            if "clean" not in options:
                continue
            asked += 1
            noisy, timestep, *_ = arguments
            assert noisy.shape[1] == timestep.shape[1] == velocity.shape[1] == FRAMES - START, role
            assert options["clean"].shape[1] == FRAMES
            assert options["first_frame"] == START
    assert asked


def test_levels_are_those_of_later_chunks():
    for method in ("afd", METHODS["sft"] | {"sigma": {"name": "steps"}}):
        made = make(method)
        made.train_step(batch_of(range(12)), 1)
        (_, timestep, _), *_ = next(call for call in made.student.calls if "clean" in call[1])
        drawn = {round(level) for level in timestep.unique().tolist()}
        assert drawn == {round(1000 * float(sigma)) for sigma in made.sampler.sigmas}


def test_of_sft_the_loss_is_the_error_behind_the_start():
    sft, batch = make("sft"), batch_of()
    metrics = sft.train_step(batch, 1)
    ((noisy, timestep, _), options, velocity) = sft.student.calls[0]
    assert torch.equal(options["clean"], batch.teacher.latents)
    x0, sigma = batch.teacher.latents[:, START:], timestep.div(1000)[..., None, None, None]
    noise = (noisy - (1 - sigma) * x0) / sigma
    assert metrics["student/loss"].item() == pytest.approx(((velocity - (noise - x0)) * sigma).square().mean().item())


def of_start(videos):
    return videos.latents[:, :START].mean(dim=(1, 2, 3, 4))


def of_rest(videos):
    return videos.latents[:, START:].mean(dim=(1, 2, 3, 4))


def test_what_a_judge_wants_of_given_frames_teaches_nothing():
    assert make("gan", discriminator=Brightness(of_start)).train_step(batch_of(), 1)["student/gradient_norm"] == 0
    assert make("gan", discriminator=Brightness(of_rest)).train_step(batch_of(), 1)["student/gradient_norm"] > 0

    def weights(score):
        dmd = make("dmd", discriminator=Brightness(score))
        dmd.train_step(batch_of(), 1)
        return dmd.student.weights()

    assert torch.equal(weights(of_start), weights(lambda videos: 0 * of_rest(videos)))
    assert not torch.equal(weights(of_start), weights(of_rest))


@pytest.mark.parametrize("method", ["dmd", "dmd causal", "dmd mixed"])
def test_the_scores_difference_is_of_what_is_generated(method):
    dmd, batch = make(METHODS[method] | {"guidance_scale": 1.0}), batch_of()
    rollouts = roll_out(dmd.student, dmd.sampler, batch.prompts, batch.teacher, dmd.randomness, 1, START).videos
    for parameter in dmd.fake_score.network.parameters():  # or the two are one
        parameter.data.mul_(1.2)
    gradient = dmd._match(rollouts, 1)
    x0s = []
    for score in (dmd.real_score, dmd.fake_score):
        ((noisy, timestep, _), _, velocity) = score.calls[-1]
        x0s.append(x0_from_velocity(noisy, velocity, timestep / 1000)[:, START - FRAMES :])
    real, fake = x0s
    distance = (rollouts.latents[:, START:] - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(gradient, (fake - real) / distance, rtol=1e-4, atol=1e-5)
    assert gradient.abs().max() > 1e-4


def test_diversity_is_of_what_is_generated():
    afd, batch = make("afd"), batch_of()
    rollouts = afd._roll_out(batch.prompts, batch.teacher, 1)
    expected = rollouts.latents[:, START:].unflatten(0, (2, 3)).std(dim=1).mean()
    assert afd.train_step(batch, 1)["rollout/diversity"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_judges_see_whole_videos_and_windows_with_generated_frames():
    oracle = Oracle()
    make("afd", discriminator=oracle).train_step(batch_of(), 1)
    assert {videos.latents.shape[1] for videos in oracle.calls} == {FRAMES}
    assert all(videos.places is None for videos in oracle.calls)
    make("afd windows", discriminator=(windows := Oracle())).train_step(batch_of(), 1)
    assert {videos.latents.shape[1] for videos in windows.calls} == {4}


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize(
    ("method", "sampler"), [*((method, {}) for method in METHODS), ("afd", LONG), ("afd joint", SHORT), ("sft", SHORT)]
)
def test_methods_run_what_they_declare(method, sampler, micro_batch):
    steps = {"first_chunk_timesteps": None, "timesteps": [500]}
    made = make(method, micro_batch=micro_batch, sampler=sampler | steps)
    check(made, batch_of(), micro_batch, made.sampler.config.calls(FRAMES, START), START)


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_change_nothing(method):
    together, apart = (make(method, micro_batch=size) for size in (None, 2))
    for step in (1, 2):
        one, other = (made.train_step(batch_of(), step) for made in (together, apart))
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4, msg=name)


class Deaf(SftConfig):
    """A method that gives its student no start."""

    name: str = f"{__name__}:Deaf"

    def passes(self, load: Load) -> tuple[Pass, ...]:
        return super().passes(replace(load, start_frames=0))


@pytest.mark.parametrize(
    ("method", "start", "options", "message"),
    [
        ("afd", 3, {}, r"data.start_frames \(3\) must be whole chunks of sampler.chunk_frames \(2\)"),
        ("sft", 6, {}, r"data.start_frames \(6\) must be whole chunks of .*, and less than data.latent_frames \(6\)"),
        (AFD | {"judged_frames": 2}, 2, {}, r"method.judged_frames \(2\) must be more than data.start_frames \(2\)"),
        (AFD | {"long_rollouts": {"frames": 12}}, 2, {}, r"start_frames \(2\) must be 0 with method.long_rollouts"),
        ("afd", 2, {"prompts": "p", "prompts_per_step": 1}, r"data.prompts \(p\) must be absent with data.start_"),
        (f"{__name__}:Deaf", 2, {}, r"data.start_frames \(2\) must be 0 with method .*: its student is given none"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(method, start, options, message):
    with pytest.raises(ValueError, match=message):
        build(METHODS[method] if method in list(METHODS) else method, sampler=SAMPLER,
              data={"latent_frames": FRAMES, "start_frames": start, **options})  # fmt: skip
