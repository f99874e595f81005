"""One DMD step with plain engines: its gradient is that of the losses through the last denoising step; who learns."""

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from afd_scale.flow.losses import distribution_matching_gradient
from afd_scale.flow.process import add_noise
from afd_scale.protocols import Unwatched
from afd_scale.types import Batch
from tests.unit.methods.engines import STUDENT, TEXT_DIM, build, make_batch
from tests.unit.methods.test_afd import RecordingRandomness
from tests.unit.methods.test_gan import SAMPLER, generate, gradients_of

SCORE = STUDENT | {"prediction": "velocity"}
CAUSAL = SCORE | {"causal": True}
OTHER = SCORE | {"num_layers": 2}
METRICS = {
    "fake_score/loss", "fake_score/gradient_norm", "student/loss", "student/gradient_norm", "student/learning_rate",
    "student/rollout_distance", "rollout/exit_sigma",
}  # fmt: skip
GAN = {"gan_weight": 0.3, "discriminator": {"name": "conv", "channels": 4, "identity_patch": (2, 1)}}


def make_dmd(micro_batch=None, sampler=None, real=None, **fields):
    method = {
        "name": "dmd", "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.0}, "student_every": 1,
        "fake_score": SCORE, "fake_score_optimizer": {"learning_rate": 3e-3, "weight_decay": 0.0},
        "guidance_scale": 3.0,
    }  # fmt: skip
    replaced = {"real_score": real} if real else {}
    return build(method | fields, sampler=SAMPLER | (sampler or {}), micro_batch=micro_batch, **replaced)


def expected_loss(dmd, batch, step):
    """DMD's loss and the GAN's from formulas of their own, with gradient; after a step that left the student alone."""
    config, rollouts = dmd.config, generate(dmd, batch, step)
    x0, text, keys = rollouts.latents, rollouts.prompts.embeddings, rollouts.prompts.keys
    networks = {"fake": config.fake_score, "real": config.real_score or config.fake_score}
    by_chunk = all(network.causal for network in networks.values())
    frames, size = x0.shape[1], dmd.sampler.config.chunk_frames
    count = frames // size if by_chunk else 1
    uniform = dmd.randomness.uniform("scores/sigma", step, keys, (count,))
    shift = dmd.sampler.config.timestep_shift
    sigma = (
        (shift * uniform / (1 + (shift - 1) * uniform)).clamp(*config.sigma_range).repeat_interleave(frames // count, 1)
    )
    noise = dmd.randomness.normal("scores/noise", step, keys, tuple(x0.shape[1:]))
    level = sigma[..., None, None, None]

    def predicted(name, embeddings):
        network, options = getattr(dmd, f"{name}_score").network, {"clean": x0} if networks[name].causal else {}
        noisy = (1 - level) * x0 + level * noise
        return noisy - level * network(noisy, 1000 * sigma, embeddings, **options)

    with torch.no_grad():
        fake, real = predicted("fake", text), predicted("real", text)
        away = predicted("real", torch.zeros_like(text))
        real = away + config.guidance_scale * (real - away)
        gradient = (fake - real) / (x0 - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        target = x0 - gradient
    matching = gan = 0.5 * (x0 - target).square().mean()
    if dmd.discriminator is not None:
        group = config.rollouts_per_prompt
        paired = slice(0, len(batch.teacher) * group)
        advantage = dmd.discriminator(rollouts[paired]) - dmd.discriminator(batch.teacher).repeat_interleave(group)
        gan = -torch.sigmoid(advantage).log()
        return matching, matching + config.gan_weight * gan.sum() / len(rollouts)
    return matching, matching


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize(
    "fields",
    [
        {"real_score": OTHER, "fake_score": CAUSAL},
        {"real_score": OTHER, "sigma_range": (0.5, 0.6)},
        {"real_score": OTHER | {"causal": True}, "fake_score": CAUSAL, "rollouts_per_prompt": 2, "micro_batch": 3},
        {"real_score": OTHER | {"causal": True}, "sampler": {"chunk_frames": 1, "window_frames": 1}},
        {**GAN, "rollouts_per_prompt": 2, "micro_batch": 1},
    ],
    ids=str,
)
def test_the_students_gradient_is_that_of_the_losses_through_the_last_denoising_step(fields, step):
    still = {"optimizer": {"learning_rate": 0.0, "gradient_norm": 0.0}}
    dmd = make_dmd(**still, **fields)
    batch, extra = make_batch(), make_batch((20,)).teacher.prompts
    batch = Batch(batch.teacher, extra)
    found, metrics = gradients_of(dmd, batch, step)
    matching, loss = expected_loss(dmd, batch, step)
    assert metrics["student/loss"].item() == pytest.approx(matching.item(), rel=1e-4)
    expected = torch.autograd.grad(loss, list(dmd.student.network.parameters()))
    assert max(g.abs().max() for g in expected) > 1e-3
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-6)


def test_the_gradient_of_distribution_matching_worked_by_hand():
    x0, real, fake = (torch.tensor(x).view(2, 1, 1, 1, 2) for x in
                      ([[1.0, 3.0], [0.0, 0.0]], [[0.0, 1.0], [2.0, 2.0]], [[3.0, 1.0], [2.0, 4.0]]))  # fmt: skip
    expected = torch.tensor([[3 / 1.5, 0.0], [0.0, 2 / 2]]).view(2, 1, 1, 1, 2)
    torch.testing.assert_close(distribution_matching_gradient(x0, real, fake), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_the_fake_score_learns_the_rollouts_by_flow_matching(prediction, causal):
    dmd = make_dmd(fake_score=CAUSAL | {"prediction": prediction, "causal": causal}, student_every=2)
    batch = make_batch()
    rollouts, before = generate(dmd, batch, 1), dmd.fake_score.weights()
    metrics = dmd.train_step(batch, 1)
    ((noisy, timestep, text), options, velocity) = dmd.fake_score.calls[0]
    assert torch.equal(text, rollouts.prompts.embeddings)
    x0 = rollouts.latents.detach()
    assert options.keys() == ({"clean"} if causal else set())
    if causal:
        torch.testing.assert_close(options["clean"], x0, rtol=0, atol=1e-4)
    level = timestep.div(1000)[..., None, None, None]
    noise = dmd.randomness.normal("fake_score/noise", 1, rollouts.prompts.keys, tuple(x0.shape[1:]))
    torch.testing.assert_close(noisy, add_noise(x0, noise, timestep / 1000), rtol=0, atol=1e-4)
    error = (velocity - (noise - x0)) * (level if prediction == "x0" else 1)
    assert metrics["fake_score/loss"].item() == pytest.approx(error.square().mean().item(), rel=1e-3)
    assert not torch.equal(dmd.fake_score.weights(), before)
    assert (timestep[:, 0] == timestep[:, 1]).all() != causal


@pytest.mark.parametrize("causal", [False, True])
def test_the_frames_that_a_score_sees(causal):
    dmd = make_dmd(fake_score=SCORE | {"causal": causal}, sampler={"window_frames": 1})
    videos, changed = make_batch().teacher, make_batch(teacher_seed=1).teacher.latents
    velocities = [
        dmd.fake_score(noisy, torch.full((2, 2), 500.0), videos.prompts.embeddings)
        for noisy in (videos.latents, torch.cat([videos.latents[:, :1], changed[:, 1:]], dim=1))
    ]
    assert torch.equal(velocities[0][:, 0], velocities[1][:, 0]) == causal


def test_the_real_score_is_what_the_fake_one_starts_as_and_stays():
    dmd = make_dmd()
    start = dmd.fake_score.weights()
    assert torch.equal(dmd.real_score.weights(), start)
    dmd.train_step(make_batch(), 1)
    assert torch.equal(dmd.real_score.weights(), start)
    assert not torch.equal(dmd.fake_score.weights(), start)
    assert all(p.grad is None for p in dmd.fake_score.network.parameters())


@pytest.mark.parametrize(("scale", "passes"), [(1.0, 1), (0.0, 2), (3.0, 2)])
def test_guidance_leads_away_from_what_a_file_says(scale, passes, tmp_path):
    embedding = torch.randn(2, TEXT_DIM, generator=torch.Generator().manual_seed(3))
    save_file({"embedding": embedding}, tmp_path / "negative.safetensors")
    dmd = make_dmd(guidance_scale=scale, negative=tmp_path / "negative.safetensors")
    dmd.train_step(make_batch(), 1)
    texts = [arguments[2] for arguments, _, _ in dmd.real_score.calls]
    assert len(texts) == passes
    assert torch.equal(texts[0], make_batch().prompts.embeddings)
    if passes == 2:
        assert torch.equal(texts[1], embedding.expand(2, -1, -1))


@pytest.mark.parametrize("content", [None, {"other": torch.zeros(1, TEXT_DIM)}, {"embedding": torch.zeros(1, 3)}])
def test_a_negative_that_does_not_fit_is_refused(content, tmp_path):
    path = tmp_path / "negative.safetensors"
    if content is not None:
        save_file(content, path)
    with pytest.raises(ValueError, match=r"method.negative \(.*negative.safetensors\) must"):
        make_dmd(negative=path)


@pytest.mark.parametrize(
    ("fields", "match"),
    [({"sigma_range": (0.5, 0.5)}, "sigma_range"), ({"fake_score": SCORE | {"text_dim": 3}}, "student.text_dim")],
)
def test_a_config_that_does_not_fit_is_refused(fields, match):
    with pytest.raises(ValidationError, match=match):
        make_dmd(**fields)


@pytest.mark.parametrize(
    ("fields", "more"),
    [
        ({}, set()),
        (GAN, {f"discriminator/{name}" for name in ("loss", "accuracy", "margin", "win_probability", "gradient_norm")}
         | {"student/gan_loss"}),
    ],
)  # fmt: skip
def test_a_step_returns_its_metrics_as_scalars_without_gradient(fields, more):
    metrics = make_dmd(**fields).train_step(make_batch(), 1)
    assert metrics.keys() == METRICS | more
    for name, value in metrics.items():
        assert value.shape == (), name
        assert not value.requires_grad, name
        assert value.isfinite(), name
    assert metrics["student/rollout_distance"] < 1e-5


def test_the_student_waits_for_its_turn_and_the_warm_up():
    dmd = make_dmd(student_every=3, ema_decay=0.15, discriminator_warmup_steps=1, **GAN)
    assert dmd.warmup_steps == 1
    average = dmd.average.weights()
    for step in range(0, 7):
        student, fake = dmd.student.weights(), dmd.fake_score.weights()
        metrics = dmd.train_step(make_batch(), step)
        its_turn = step in (3, 6)
        assert ("student/loss" in metrics) == its_turn
        assert torch.equal(dmd.student.weights(), student) != its_turn
        assert not torch.equal(dmd.fake_score.weights(), fake)
        if its_turn:
            decay = min(0.15, (step // 3) / (step // 3 + 10))
            average = decay * average + (1 - decay) * dmd.student.weights()
        torch.testing.assert_close(dmd.average.weights(), average, rtol=0, atol=2e-7)


class Bright:
    """A real score that knows videos of ones alone, whatever the text."""

    micro_batch = None
    watch = Unwatched()

    def __call__(self, noisy, timestep, text, **options):
        return (noisy - 1) / timestep.div(1000)[..., None, None, None]

    def resident(self, sampling=False):
        return torch.no_grad()


def test_the_student_comes_to_what_the_real_score_knows():
    dmd = make_dmd(real=Bright(), fake_score_optimizer={"learning_rate": 1e-2, "weight_decay": 0.0})
    distances = []
    for step in range(1, 61):
        dmd.train_step(make_batch((2 * step, 2 * step + 1)), step)
        distances.append((generate(dmd, make_batch((0, 1)), 2).latents - 1).square().mean().item())
    assert distances[-1] < 0.5 * distances[0]


def test_no_random_number_is_used_twice():
    randomness = RecordingRandomness()
    for rank in range(2):
        dmd = make_dmd(**GAN)
        dmd.randomness = randomness
        for step in (0, 1, 2):
            dmd.train_step(make_batch((4 * step + rank, 4 * step + 2 + rank)), step)
    drawn = [each for each in randomness.drawn if each[0] != "rollout/exit"]  # which is the same on all ranks
    assert len(set(drawn)) == len(drawn)
    streams = {"rollout/exit", "rollout/noise", "rollout/renoise", "fake_score/noise", "fake_score/sigma",
               "scores/noise", "scores/sigma"}  # fmt: skip
    assert {stream for stream, _, _ in randomness.drawn} == streams
