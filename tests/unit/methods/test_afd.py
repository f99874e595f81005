"""One AFD step with plain engines: who learns from what, who follows whom, and that it works."""

import math
from dataclasses import replace

import pytest
import torch

from afd_scale.flow.randomness import Randomness
from tests.unit.methods.engines import SHAPE, Oracle, build, make_batch

METRICS = {
    "student/learning_rate",
    "student/loss", "student/old_policy_distance", "student/gradient_norm", "discriminator/loss",
    "discriminator/accuracy", "discriminator/margin", "discriminator/win_probability", "discriminator/gradient_norm",
    "rollout/reward_mean", "rollout/reward_group_std", "rollout/weight_spread", "rollout/diversity",
}  # fmt: skip


def make_afd(discriminator=None, micro_batch=None, **fields):
    method = {
        "name": "afd", "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.0}, "prior_weight": 0.0,
        "discriminator_optimizer": {"learning_rate": 1e-2, "weight_decay": 0.0}, "rollouts_per_prompt": 3,
        "advantage": {"clip": 1.0}, "policy_mix": 1.0, "old_policy_decay": 0.7,
        "discriminator": {"name": "conv", "channels": 4, "identity_patch": (2, 1)},
    }  # fmt: skip
    replaced = {"discriminator": discriminator} if discriminator else {}
    return build(method | fields, micro_batch=micro_batch, **replaced)


@pytest.mark.parametrize(
    ("fields", "more"),
    [
        ({}, set()),
        ({"prior_weight": 1e-4}, {"student/reference_distance"}),
        ({"r1_weight": 1.0}, {"discriminator/penalty"}),
        ({"r2_weight": 1.0, "discriminator_objective": "softplus"}, {"discriminator/penalty"}),
        ({"states_per_rollout": 2, "context_gradient": True, "normalise": False}, set()),
        ({"rollouts_per_prompt": 1, "advantage": {"baseline": "batch"}}, set()),
        ({"credit": "regression", "student_rollouts": 2}, set()),
        ({"taught": "resampled", "student_rollouts": 2}, set()),
        ({"step_target": 0.1}, {"student/rate_factor"}),
    ],
    ids=str,
)
def test_a_step_returns_its_metrics_as_scalars_without_gradient(fields, more):
    metrics = make_afd(**fields).train_step(make_batch(), 1)
    assert metrics.keys() == METRICS | more
    for name, value in metrics.items():
        assert value.shape == (), name
        assert not value.requires_grad, name
        assert value.isfinite(), name


def test_the_student_learns_and_the_old_policy_follows():
    afd = make_afd()
    old, reference = afd.old_policy.weights(), afd.student.weights()
    for step in (1, 2):
        metrics = afd.train_step(make_batch(), step)
        assert metrics["student/gradient_norm"] > 0
        student = afd.student.weights()
        assert (student - reference).abs().max() > 1e-4
        old = 0.7 * old + (1 - 0.7) * student
        torch.testing.assert_close(afd.old_policy.weights(), old, rtol=0, atol=2e-7)
        reference = student
    assert metrics["student/old_policy_distance"] > 0


def test_at_the_first_step_the_student_is_the_old_policy():
    assert make_afd().train_step(make_batch(), 1)["student/old_policy_distance"] == 0


def test_the_old_policy_warms_up():
    afd = make_afd(old_policy_warmup=0.3)
    for step in (1, 2, 3, 4):
        afd.train_step(make_batch(), step)
    assert afd.old_policy.decays == pytest.approx([0.3, 0.6, 0.7, 0.7])


def test_rollouts_are_those_of_the_old_policy():
    afd = make_afd(Oracle())
    with torch.no_grad():
        afd.old_policy.network.head.head.weight.zero_()
        afd.old_policy.network.head.head.bias.fill_(2.0)  # it generates 2 everywhere, whatever the student does
    metrics = afd.train_step(make_batch(), 1)
    assert metrics["rollout/reward_mean"].item() == pytest.approx(2, abs=1e-4)
    assert all("cache" not in options for _, options, _ in afd.student.calls)


def test_a_rollout_belongs_to_its_sample_whatever_batch_it_is_in():
    def rollouts(*samples):
        oracle = Oracle()
        make_afd(oracle).train_step(make_batch(samples), 1)
        videos = oracle.calls[-1].latents
        assert videos.shape == (3 * len(samples), *SHAPE)
        return videos.unflatten(0, (-1, 3))

    together, apart = rollouts(4, 9, 11), torch.cat([rollouts(11), rollouts(4, 9)])
    torch.testing.assert_close(together[[2, 0, 1]], apart, rtol=1e-4, atol=1e-4)
    distances = torch.pdist(together.flatten(2).flatten(0, 1))
    assert distances.min() > 0.01, "two rollouts are the same"


def test_a_prompt_is_judged_and_trained_on_with_its_own_text():
    # A judge of the text alone prefers nothing, provided that a rollout is paired with its own prompt's teacher.
    afd = make_afd(oracle := Oracle(lambda videos: 10 * videos.prompts.embeddings.sum(dim=(1, 2))))
    batch = make_batch()
    metrics = afd.train_step(batch, 1)
    assert metrics["discriminator/loss"].item() == pytest.approx(math.log(2))
    assert metrics["rollout/weight_spread"] < 1e-3
    repeated = batch.prompts.embeddings.repeat_interleave(3, dim=0)
    judged = oracle.calls[-1]
    assert torch.equal(judged.prompts.embeddings, repeated)
    assert judged.prompts.texts == tuple(text for text in batch.prompts.texts for _ in range(3))
    ((arguments, options, _),) = afd.student.calls
    assert torch.equal(arguments[2], repeated)
    assert torch.equal(options["clean"], judged.latents)


def test_the_teacher_reaches_the_student_through_the_discriminator_only():
    def student_after_two_steps(teacher_seed, **fields):
        afd = make_afd(**fields)
        for step in (1, 2):
            afd.train_step(make_batch(teacher_seed=teacher_seed), step)
        return afd.student.weights()

    frozen = {"discriminator_optimizer": {"learning_rate": 0.0}}
    assert torch.equal(student_after_two_steps(1, **frozen), student_after_two_steps(2, **frozen))
    assert not torch.equal(student_after_two_steps(1), student_after_two_steps(2))


def test_the_students_step_leaves_the_discriminator_alone():
    trained, alone = make_afd(), make_afd()
    trained.train_step(make_batch(), 1)
    teacher = make_batch().teacher
    alone.jury.hear(teacher, alone._roll_out(teacher.prompts, teacher, 1), alone.randomness, 1, 100)
    assert torch.equal(trained.engines["discriminator"].weights(), alone.engines["discriminator"].weights())
    assert all(p.grad is None for p in trained.engines["discriminator"].network.parameters())
    assert all(p.grad is None for p in trained.old_policy.network.parameters())


def test_the_warm_up_trains_the_discriminator_only():
    afd = make_afd(discriminator_warmup_steps=2)
    student, old, judge = afd.student.weights(), afd.old_policy.weights(), afd.engines["discriminator"].weights()
    assert afd.warmup_steps == 2
    metrics = [afd.train_step(make_batch(), step) for step in (-1, 0)]
    assert all(m.keys() == {name for name in METRICS if name.startswith("discriminator/")} for m in metrics)
    assert torch.equal(afd.student.weights(), student)
    assert torch.equal(afd.old_policy.weights(), old)
    assert not torch.equal(afd.engines["discriminator"].weights(), judge)


def test_the_prior_holds_the_student_at_the_reference():
    def distance_after(prior_weight):
        afd = make_afd(Oracle(), prior_weight=prior_weight)
        for step in range(1, 9):
            metrics = afd.train_step(make_batch(), step)
        return metrics["student/reference_distance"]

    assert distance_after(100.0) < 0.5 * distance_after(1e-6)


def test_the_discriminator_learns_to_tell_the_teacher():
    afd = make_afd(discriminator_warmup_steps=30)
    losses = [afd.train_step(make_batch(), step)["discriminator/loss"].item() for step in range(-29, 1)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize(
    ("sign", "fields"),
    [
        (1, {}),
        (-1, {}),
        (1, {"states_per_rollout": 2, "context_gradient": True}),
        (1, {"normalise": False, "optimizer": {"learning_rate": 1e-3}}),
        (1, {"credit": "regression"}),
        (1, {"taught": "resampled", "resample_temperature": 0.5}),
        (1, {"policy_mix": 0.1, "sigma": {"name": "uniform"}, "advantage": {"baseline": "batch", "spread": "group"}}),
    ],
    ids=str,
)
def test_the_reward_of_a_frozen_judge_rises(sign, fields):
    afd = make_afd(Oracle(lambda videos: sign * videos.latents.mean(dim=(1, 2, 3, 4))), **fields)
    rewards = [
        afd.train_step(make_batch((2 * step, 2 * step + 1)), step)["rollout/reward_mean"].item()
        for step in range(1, 41)
    ]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1


class RecordingRandomness(Randomness):
    """Writes down each (stream, step, sample) that is drawn."""

    def __init__(self):
        super().__init__(0)
        object.__setattr__(self, "drawn", [])

    def _draw(self, draw, stream, step, samples, shape, device):
        self.drawn.extend((stream, step, sample) for sample in samples)
        return super()._draw(draw, stream, step, samples, shape, device)


@pytest.mark.parametrize(("taught", "more"), [("extremes", set()), ("resampled", {"student/resample"})])
def test_no_random_number_is_used_twice(taught, more):
    # Two ranks with the samples of two steps: what they draw must be all different.
    randomness = RecordingRandomness()
    for rank in range(2):
        afd = make_afd(r1_weight=1.0, r2_weight=1.0, states_per_rollout=3, taught=taught)
        afd.randomness = randomness
        afd.train_step(make_batch((rank, 2 + rank)), 0)
        for step in (1, 2):
            afd.train_step(make_batch((4 * step + rank, 4 * step + 2 + rank)), step)
    assert len(set(randomness.drawn)) == len(randomness.drawn)
    streams = {stream for stream, _, _ in randomness.drawn}
    assert streams == {
        "rollout/noise", "rollout/renoise", "penalty/teacher", "penalty/student", "student/noise", "student/sigma",
        *more,
    }  # fmt: skip


def loss_of(afd, rollouts, weight):
    """The student's loss of these rollouts at fixed states."""
    states = afd._noise(rollouts, 1, 0)
    old = {"old_policy": afd._frozen_velocity(afd.old_policy, rollouts, states)}
    loss, _ = afd._student_loss(rollouts, replace(states, velocities=old), weight)
    return loss


def test_regression_with_equal_weights_is_self_distillation():
    """Whatever the judge says of them: the plain error against the rollouts themselves."""
    afd = make_afd(Oracle(lambda videos: torch.zeros(len(videos))), credit="regression", normalise=False)
    afd.student.network.head.head.weight.data.mul_(1.5)  # it is not the old policy
    metrics = afd.train_step(make_batch(), 1)
    ((arguments, options, velocity),) = afd.student.calls
    noisy, clean, sigma = arguments[0], options["clean"], arguments[1] / 1000
    target = (noisy - clean) / sigma[:, :, None, None, None].clamp(min=1e-3)
    assert metrics["student/loss"].item() == pytest.approx((velocity - target).square().mean().item(), rel=1e-5)


def test_regression_weights_are_relative_to_the_batch():
    """Judged 0, 1 and 2 in each group: standardised -s, 0, s with s = sqrt(3/2), in [0, 1] by clip 2, mean 1/2."""
    afd = make_afd(credit="regression", advantage={"clip": 2.0, "spread": "group"})
    rollouts = make_batch((4, 9)).teacher.take([0, 0, 0, 1, 1, 1])
    reward = torch.tensor([[0.0, 1, 2], [5.0, 4, 3]])
    taught, weight = afd._choose(rollouts, reward, afd._weigh(reward, 2), 1)
    assert taught is rollouts
    high, low = 1 + math.sqrt(1.5) / 2, 1 - math.sqrt(1.5) / 2
    torch.testing.assert_close(weight, torch.tensor([low, 1, high, high, 1, low])[:, None])
    each = torch.stack([loss_of(afd, rollouts[row : row + 1], weight[row : row + 1]) for row in range(6)])
    torch.testing.assert_close(loss_of(afd, rollouts, weight), each.mean())
    bad = torch.zeros(1, 1)
    assert loss_of(afd, rollouts[:1], bad) == 0  # the worst may be left alone, and is not pushed away


def test_the_student_may_learn_from_resampled_rollouts():
    """A temperature near 0 leaves the best of each group, drawn as often as there is room for."""
    afd = make_afd(taught="resampled", resample_temperature=1e-3, student_rollouts=2)
    rollouts = make_batch((4, 9)).teacher
    rollouts = replace(rollouts, prompts=rollouts.prompts.repeat(3), latents=rollouts.latents.repeat_interleave(3, 0))
    rollouts = rollouts.of(torch.arange(6.0)[:, None, None, None, None].expand(rollouts.latents.shape))
    reward = torch.tensor([[0.5, 0.9, 0.2], [0.0, 0.45, 0.5]])
    chosen, weight = afd._choose(rollouts, reward, afd._weigh(reward, 2), 1)
    assert chosen.latents[:, 0, 0, 0, 0].tolist() == [1, 1, 5, 5]
    assert chosen.prompts.texts == tuple(rollouts.prompts.texts[row] for row in (1, 1, 5, 5))
    assert weight.tolist() == [[1], [1], [1], [1]]
    assert chosen.prompts.keys == tuple(rollouts.prompts.keys[row] for row in (0, 1, 3, 4))
    states = afd._noise(chosen, 1, 0)
    assert not torch.equal(states.latents[0], states.latents[1]), "one that is drawn twice is noised in two ways"


def test_the_draw_is_of_the_sample_and_step():
    def drawn(*samples, step=1):
        afd = make_afd(taught="resampled", resample_temperature=3.0)
        prompts = make_batch(samples).teacher.prompts.repeat(3)
        latents = torch.arange(3.0).repeat(len(samples))[:, None, None, None, None].expand(-1, *SHAPE)
        reward = torch.tensor([[0.0, 1, 2]]).expand(len(samples), 3)
        rollouts = replace(make_batch().teacher, prompts=prompts, latents=latents)
        chosen, _ = afd._choose(rollouts, reward, reward[..., None], step)
        return chosen.latents[:, 0, 0, 0, 0].unflatten(0, (-1, 3)).tolist()

    assert drawn(4, 9) == drawn(4) + drawn(9)
    assert len({str(drawn(4, step=step)) for step in range(1, 20)}) > 1


def test_the_rate_is_steered_by_the_distance_from_the_old_policy():
    afd, plain = make_afd(step_target=0.05), make_afd()
    expected = 1.0
    for step in range(1, 7):
        metrics = afd.train_step(make_batch(), step)
        rate = plain.train_step(make_batch(), step)["student/learning_rate"]
        assert metrics["student/rate_factor"].item() == pytest.approx(expected)
        assert metrics["student/learning_rate"].item() == pytest.approx(rate.item() * expected)
        measured = metrics["student/old_policy_distance"].item()
        expected *= min(max((0.05 / measured) ** 0.5, 0.8), 1.25) if measured else 1.25
        assert afd.memory["rate_factor"].item() == pytest.approx(expected)
    assert not plain.memory


def test_the_distance_nears_its_target():
    def distance(target):
        afd = make_afd(step_target=target, optimizer={"learning_rate": 1e-3, "weight_decay": 0.0})
        for step in range(1, 41):
            metrics = afd.train_step(make_batch((2 * step, 2 * step + 1)), step)
        return metrics["student/old_policy_distance"].item()

    assert distance(0.01) == pytest.approx(0.01, rel=0.5)
    assert distance(0.04) == pytest.approx(0.04, rel=0.5)


def test_the_rate_goes_on_from_what_a_checkpoint_holds():
    afd, other = make_afd(step_target=0.05), make_afd(step_target=0.05)
    for step in (1, 2, 3):
        afd.train_step(make_batch(), step)
    held = {name: float(value) for name, value in afd.memory.items()}
    other.memory.update({name: torch.tensor(value) for name, value in held.items()})
    assert torch.equal(other._rate_factor, afd._rate_factor)
    assert other.train_step(make_batch(), 4)["student/rate_factor"] == afd.memory["rate_factor"]


def test_what_nothing_is_drawn_from_or_by_is_refused():
    with pytest.raises(ValueError, match=r"resample_temperature \(0.5\) must be left out where taught is extremes"):
        make_afd(resample_temperature=0.5)
    with pytest.raises(ValueError, match=r"rollouts_per_prompt \(1\) must be at least 2 for taught resampled"):
        make_afd(taught="resampled", rollouts_per_prompt=1, advantage={"baseline": "batch"})
