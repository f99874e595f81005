"""One GAN step with plain engines: its gradient is autograd's through the last denoising step, and who learns when."""

import pytest
import torch
import torch.nn.functional as F

from afd_scale.flow.losses import generator_loss
from afd_scale.flow.process import add_noise, x0_from_velocity
from afd_scale.types import Videos
from tests.unit.methods.engines import Oracle, build, make_batch
from tests.unit.methods.test_afd import RecordingRandomness

METRICS = {
    "discriminator/loss", "discriminator/accuracy", "discriminator/margin", "discriminator/win_probability",
    "discriminator/gradient_norm",
    "student/loss", "student/gradient_norm", "student/learning_rate", "student/rollout_distance", "rollout/exit_sigma",
}  # fmt: skip
SAMPLER = {"timesteps": [1000, 750, 500], "chunk_frames": 1}


def make_gan(discriminator=None, micro_batch=None, sampler=None, **fields):
    method = {
        "name": "gan", "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.0}, "rollouts_per_prompt": 2,
        "discriminator_optimizer": {"learning_rate": 1e-2, "weight_decay": 0.0},
        "discriminator": {"name": "conv", "channels": 4, "identity_patch": (2, 1)},
    }  # fmt: skip
    replaced = {"discriminator": discriminator} if discriminator else {}
    return build(method | fields, sampler=SAMPLER | (sampler or {}), micro_batch=micro_batch, **replaced)


class Brightness(Oracle):
    """A frozen judge with an input gradient."""

    def input_gradient(self, videos, loss_of):
        with torch.enable_grad():
            latents = videos.latents.detach().requires_grad_()
            loss = loss_of(self(videos.of(latents)))
        return loss.detach(), torch.autograd.grad(loss, latents)[0]


def exit_of(gan, step):
    """Denoising steps of a rollout of this step, in a sampler whose chunks have equally many."""
    drawn = 1 - gan.randomness.uniform("rollout/exit", step, (0,), ()).item()
    return next(count for count in range(1, len(gan.sampler.sigmas) + 1) if count / len(gan.sampler.sigmas) >= drawn)


def generate(gan, batch, step):
    """The rollouts, with gradient through the last denoising step of each chunk, by a loop of its own."""
    network, sampler = gan.student.network, gan.sampler
    prompts = batch.prompts.repeat(gan.config.rollouts_per_prompt)
    latents, size = batch.teacher.latents, sampler.config.chunk_frames
    noise = sampler.draw(gan.randomness, "rollout", step, prompts.keys, tuple(latents.shape[1:]), latents.device)
    chunks = []
    for start in range(0, latents.shape[1], size):
        frames = slice(start, start + size)
        x = x0 = noise.initial[:, frames]
        for count in range(last := exit_of(gan, step)):
            sigma = (sampler.sigmas if start else sampler.first_sigmas)[count].expand(x.shape[:2])
            if count > 0:
                x = add_noise(x0.detach(), noise.again[count - 1][:, frames], sigma)
            with torch.set_grad_enabled(count + 1 == last):
                past = torch.cat([*(c.detach() for c in chunks), torch.zeros_like(x)], dim=1)
                noisy = torch.cat([torch.zeros_like(past[:, :start]), x], dim=1)
                levels = torch.cat([sigma.new_zeros(len(x), start), sigma], dim=1)
                velocity = network(noisy, 1000 * levels, prompts.embeddings, clean=past, clean_gradient=False)
                x0 = x0_from_velocity(x, velocity[:, start:], sigma)
        chunks.append(x0)
    return Videos(prompts, torch.cat(chunks, dim=1))


def gradients_of(gan, batch, step):
    """Of the student's weights as its optimizer finds them, which does not move."""
    found = []
    step_ = gan.student.engine.step

    def record(rate):
        found.extend(p.grad.clone() for p in gan.student.network.parameters())
        return step_(rate)

    gan.student.engine.step = record
    metrics = gan.train_step(batch, step)
    return found, metrics


@pytest.mark.parametrize("step", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("fields", "micro_batch"),
    [
        ({}, None),
        ({"discriminator_objective": "softplus"}, None),
        ({"rollouts_per_prompt": 1, "r1_weight": 1.0}, 1),
        ({"sampler": {"window_frames": 1}}, 3),
        ({"sampler": {"chunk_frames": 2}}, None),
        ({"sampler": {"first_chunk_timesteps": [1000, 900, 100]}}, None),
    ],
    ids=str,
)
def test_the_students_gradient_is_autograds_through_the_last_denoising_step(fields, micro_batch, step):
    gan = make_gan(micro_batch=micro_batch, optimizer={"learning_rate": 0.0, "gradient_norm": 0.0}, **fields)
    batch, group = make_batch(), gan.config.rollouts_per_prompt
    found, metrics = gradients_of(gan, batch, step)
    # The discriminator is now as it judged.
    rollouts = generate(gan, batch, step)
    fake, real = gan.discriminator(rollouts), gan.discriminator(batch.teacher).repeat_interleave(group)
    advantage = fake - real if gan.judge.objective == "bradley_terry" else fake
    loss = -torch.sigmoid(advantage).log().mean()
    expected = torch.autograd.grad(loss, list(gan.student.network.parameters()))
    assert metrics["student/loss"].item() == pytest.approx(loss.item(), abs=1e-5)
    assert max(g.abs().max() for g in expected) > 1e-4
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_the_steps_above_leave_the_sampler_at_different_places():
    gan = make_gan()
    assert len({exit_of(gan, step) for step in (1, 2, 3, 4)}) > 1
    found = [exit_of(gan, step) for step in range(300)]
    assert all(70 < found.count(count) < 130 for count in (1, 2, 3))


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_the_pass_with_gradient_predicts_the_rollout_that_was_judged(step):
    gan = make_gan(judge := Brightness())
    expected, last = generate(gan, make_batch(), step).latents, exit_of(gan, step)
    metrics = gan.train_step(make_batch(), step)
    assert metrics["student/rollout_distance"] < 1e-5
    torch.testing.assert_close(judge.calls[-1].latents, expected, rtol=0, atol=1e-4)
    assert metrics["rollout/exit_sigma"].item() == pytest.approx(gan.sampler.sigmas[last - 1].item())
    cached = [options for _, options, _ in gan.student.calls if "cache" in options]
    assert len(cached) == 2 * last, "two chunks: the first is cached in the pass of the second one's first step"


@pytest.mark.parametrize(
    ("fields", "more"),
    [({}, set()), ({"r1_weight": 1.0}, {"discriminator/penalty"}), ({"discriminator_objective": "softplus"}, set())],
)
def test_a_step_returns_its_metrics_as_scalars_without_gradient(fields, more):
    metrics = make_gan(**fields).train_step(make_batch(), 1)
    assert metrics.keys() == METRICS | more
    for name, value in metrics.items():
        assert value.shape == (), name
        assert not value.requires_grad, name
        assert value.isfinite(), name


def test_student_and_discriminator_learn_and_keep_no_gradients():
    gan = make_gan()
    student, judge = gan.student.weights(), gan.discriminator.weights()
    gan.train_step(make_batch(), 1)
    assert (gan.student.weights() - student).abs().max() > 1e-4
    assert (gan.discriminator.weights() - judge).abs().max() > 1e-4
    for engine in (gan.student, gan.discriminator):
        assert all(p.grad is None for p in engine.network.parameters())


def test_the_judgement_leaves_the_discriminator_alone():
    trained, alone = make_gan(), make_gan(student_every=2)
    for gan in (trained, alone):
        gan.train_step(make_batch(), 1)
    assert torch.equal(trained.discriminator.weights(), alone.discriminator.weights())


def test_the_student_waits_for_its_turn_and_the_average_follows_it_alone():
    gan = make_gan(student_every=3, ema_decay=0.15)
    average = gan.average.weights()
    for step in range(1, 7):
        student, judge = gan.student.weights(), gan.discriminator.weights()
        metrics = gan.train_step(make_batch(), step)
        assert ("student/loss" in metrics) == (step % 3 == 0)
        assert torch.equal(gan.student.weights(), student) == (step % 3 != 0)
        assert not torch.equal(gan.discriminator.weights(), judge)
        if step % 3 == 0:
            decay = min(0.15, (step // 3) / (step // 3 + 10))
            average = decay * average + (1 - decay) * gan.student.weights()
        torch.testing.assert_close(gan.average.weights(), average, rtol=0, atol=2e-7)
    assert gan.average.decays == pytest.approx([1 / 11, 0.15])


def test_the_warm_up_trains_the_discriminator_only():
    gan = make_gan(discriminator_warmup_steps=2, ema_decay=0.9)
    student, average, judge = gan.student.weights(), gan.average.weights(), gan.discriminator.weights()
    assert gan.warmup_steps == 2
    for step in (-1, 0):
        assert all(name.startswith("discriminator/") for name in gan.train_step(make_batch(), step))
    assert torch.equal(gan.student.weights(), student)
    assert torch.equal(gan.average.weights(), average)
    assert not torch.equal(gan.discriminator.weights(), judge)


@pytest.mark.parametrize("objective", ["bradley_terry", "softplus"])
def test_a_frozen_judge_is_pleased(objective):
    gan = make_gan(judge := Brightness(lambda videos: 5 * videos.latents.mean(dim=(1, 2, 3, 4))),
                   discriminator_objective=objective)  # fmt: skip
    brightness = []
    for step in range(1, 41):
        gan.train_step(make_batch((2 * step, 2 * step + 1)), step)
        brightness.append(judge.calls[-1].latents.mean().item())
    assert sum(brightness[-5:]) / 5 > sum(brightness[:5]) / 5 + 0.3


def test_no_random_number_is_used_twice():
    randomness = RecordingRandomness()
    for rank in range(2):
        gan = make_gan(r1_weight=1.0, r2_weight=1.0)
        gan.randomness = randomness
        for step in (0, 1, 2):
            gan.train_step(make_batch((4 * step + rank, 4 * step + 2 + rank)), step)
    drawn = [each for each in randomness.drawn if each[0] != "rollout/exit"]  # which is the same on all ranks
    assert len(set(drawn)) == len(drawn)
    streams = {"rollout/noise", "rollout/renoise", "rollout/exit", "penalty/teacher", "penalty/student"}
    assert {stream for stream, _, _ in randomness.drawn} == streams


def test_the_generators_loss_is_its_formula():
    fake, real = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, 0.0, -3.0])
    torch.testing.assert_close(generator_loss(fake, real), -torch.sigmoid(fake - real).log())
    torch.testing.assert_close(generator_loss(fake, None), F.softplus(-fake))
