"""One step of supervised flow matching with plain engines."""

import pytest
import torch

from tests.unit.methods.engines import build, make_batch


def make_sft(prediction="x0", chunk_frames=1, micro_batch=None, **fields):
    method = {"name": "sft", "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.0}}
    frames = {"chunk_frames": chunk_frames}
    return build(method | fields, student={"prediction": prediction}, sampler=frames, micro_batch=micro_batch)


def noise_of(arguments, batch):
    """The noise in what the student was given: noisy = (1 - sigma) x0 + sigma noise."""
    noisy, timestep, _ = arguments
    sigma = timestep.div(1000)[..., None, None, None]
    return (noisy - (1 - sigma) * batch.teacher.latents) / sigma


def test_a_step_returns_its_metrics_and_moves_the_student():
    sft = make_sft()
    before = sft.student.weights()
    metrics = sft.train_step(make_batch(), 1)
    assert metrics.keys() == {"student/loss", "student/gradient_norm", "student/learning_rate"}
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    assert metrics["student/learning_rate"].item() == pytest.approx(3e-3)
    assert (sft.student.weights() - before).abs().max() > 1e-4


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_the_loss_is_the_error_on_the_noised_teacher_given_its_clean_past(prediction):
    sft, batch = make_sft(prediction), make_batch()
    metrics = sft.train_step(batch, 1)
    (arguments, options, velocity) = sft.student.calls[0]
    assert torch.equal(arguments[2], batch.prompts.embeddings)
    assert options.keys() == {"clean"}
    assert torch.equal(options["clean"], batch.teacher.latents)
    error = velocity - (noise_of(arguments, batch) - batch.teacher.latents)
    if prediction == "x0":
        error = error * arguments[1].div(1000)[..., None, None, None]
    assert metrics["student/loss"].item() == pytest.approx(error.square().mean().item(), rel=1e-3)


@pytest.mark.parametrize("name", ["uniform", "steps", "logit_normal"])
def test_a_chunk_has_one_level_and_each_chunk_its_own(name):
    sft = make_sft(chunk_frames=2, sigma={"name": name})
    sft.train_step(make_batch(range(20), frames=4), 1)
    ((_, timestep, _), _, _) = sft.student.calls[0]
    assert timestep.shape == (20, 4)
    assert torch.equal(timestep[:, 0], timestep[:, 1])
    assert torch.equal(timestep[:, 2], timestep[:, 3])
    assert not torch.equal(timestep[:, 0], timestep[:, 2])
    assert len(timestep[:, 0].unique()) > 1


def test_each_step_draws_its_own_noise_and_a_repeated_step_the_same():
    sft, batch = make_sft(), make_batch()
    for step in (1, 2, 1):
        sft.train_step(batch, step)
    first, second, again = (noise_of(arguments, batch) for arguments, _, _ in sft.student.calls)
    assert torch.equal(first, again)
    assert (first - second).abs().amax(dim=(1, 2, 3, 4)).min() > 0.1


def test_the_average_follows_slowly_only_after_its_start():
    sft = make_sft(ema_decay=0.3)
    average = sft.average.weights()
    for step in (1, 2, 8):
        sft.train_step(make_batch(), step)
        decay = min(0.3, step / (step + 10))
        average = decay * average + (1 - decay) * sft.student.weights()
        torch.testing.assert_close(sft.average.weights(), average, rtol=0, atol=2e-7)
    assert sft.average.decays == pytest.approx([1 / 11, 2 / 12, 0.3])


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_the_error_on_the_same_videos_falls(prediction):
    sft = make_sft(prediction, optimizer={"learning_rate": 1e-2, "weight_decay": 0.0})
    errors = [sft.train_step(make_batch(range(8)), step)["student/loss"].item() for step in range(1, 61)]
    assert sum(errors[-10:]) / 10 < 0.8 * sum(errors[:4]) / 4


def test_there_is_no_warm_up():
    sft = make_sft()
    assert sft.warmup_steps == 0
