"""Each loss against its formula, worked by hand where one number is enough."""

import math

import pytest
import torch

from afd_scale.flow import losses
from afd_scale.flow.process import add_noise, x0_from_velocity


def one(value):
    """A video of one number, (1, 1, 1, 1, 1)."""
    return torch.full((1, 1, 1, 1, 1), float(value))


def test_bradley_terry_is_the_log_loss_of_the_preference():
    teacher, student = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0])
    expected = (math.log(1 + math.exp(-1.5)) + math.log(1 + math.exp(2.0))) / 2
    assert losses.bradley_terry_loss(teacher, student).item() == pytest.approx(expected)
    assert losses.bradley_terry_loss(teacher, teacher).item() == pytest.approx(math.log(2))


def test_bradley_terry_pairs_a_teacher_with_all_rollouts_of_its_prompt():
    teacher, student = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0, 2.0, 1.0], [-1.0, 1.0, 0.5]])
    pairs = [losses.bradley_terry_loss(teacher[p, 0], student[p, g]).item() for p in range(2) for g in range(3)]
    assert losses.bradley_terry_loss(teacher, student).item() == pytest.approx(sum(pairs) / 6)


def test_bradley_terry_sees_only_differences_and_does_not_overflow():
    teacher, student = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0])
    shifted = losses.bradley_terry_loss(teacher + 7, student + 7)
    torch.testing.assert_close(shifted, losses.bradley_terry_loss(teacher, student))
    far = torch.tensor([1e4])
    assert losses.bradley_terry_loss(-far, far).item() == 2e4
    assert losses.bradley_terry_loss(far, -far).item() == 0


def test_softplus_scores_each_video_by_itself():
    teacher, student = torch.tensor([2.0, -1.0]), torch.tensor([0.5])
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(1))) / 2 + math.log1p(math.exp(0.5))
    assert losses.softplus_loss(teacher, student).item() == pytest.approx(expected)


@pytest.mark.parametrize("deviation", [0.01, 0.5])
def test_finite_difference_penalty_is_the_squared_gradient_of_a_linear_scorer(deviation):
    # Noise along each axis in turn, sqrt(6) long, has unit covariance: the mean squared slope is exactly |gradient|^2.
    gradient = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = math.sqrt(6) * torch.eye(6, dtype=torch.float64)
    penalty = losses.finite_difference_penalty(x @ gradient + 3, (x + deviation * noise) @ gradient + 3, deviation)
    torch.testing.assert_close(penalty, gradient.square().sum())


def policy_case(weight, *, batch=2, seed=0, **options):
    """Random samples of a weight, or of one a frame, at v = v_old, and the gradient of the summed loss by v."""
    generator = torch.Generator().manual_seed(seed)
    x0, noise, old = (torch.randn(batch, 3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    sigma = torch.rand(batch, 3, generator=generator, dtype=torch.float64) * 0.8 + 0.2
    noisy = add_noise(x0, noise, sigma)
    velocity = old.clone().requires_grad_()
    options = {"policy_mix": 0.1, "clip": 5.0, "normalise": True} | options
    weights = torch.tensor(weight if isinstance(weight, list) else [weight], dtype=torch.float64).expand(batch, -1)
    loss = losses.policy_loss(velocity, old, noisy, x0, sigma, weights, **options)
    assert loss.shape == (batch,)
    (gradient,) = torch.autograd.grad(loss.sum(), velocity)
    return x0, noisy, sigma, velocity.detach(), gradient


@pytest.mark.parametrize("normalise", [True, False])
def test_at_the_old_policy_the_gradient_is_proportional_to_1_minus_2w(normalise):
    worst = policy_case(0, normalise=normalise)[-1]
    assert worst.abs().min() > 0
    for weight in (0.25, 0.5, 0.8, 1.0):
        gradient = policy_case(weight, normalise=normalise)[-1]
        torch.testing.assert_close(gradient, (1 - 2 * weight) * worst)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("weight", [0, 1])
def test_a_step_moves_towards_good_samples_and_away_from_bad_ones(weight, normalise):
    x0, noisy, sigma, velocity, gradient = policy_case(weight, normalise=normalise)

    def distance(v):
        return (x0_from_velocity(noisy, v, sigma) - x0).square().flatten(1).mean(1)

    moved, here = distance(velocity - 0.01 * gradient), distance(velocity)
    assert (moved < here).all() if weight == 1 else (moved > here).all()


@pytest.mark.parametrize("normalise", [True, False])
def test_clip_scales_the_gradient_and_policy_mix_does_not(normalise):
    base = policy_case(0.9, normalise=normalise)[-1]
    torch.testing.assert_close(policy_case(0.9, normalise=normalise, policy_mix=0.7)[-1], base)
    torch.testing.assert_close(policy_case(0.9, normalise=normalise, clip=1.0)[-1], base / 5)


# x0 = 1, noise = 3, sigma = 1/2, so noisy = 2 and the target velocity is 2; v_old = 1, v = 2, policy_mix = 1/2:
# v+ = 1.5 gives x0 1.25, an error of 0.25; v- = 0.5 gives x0 1.75, an error of 0.75. Weight 3/4, clip / mix = 10.
HAND_WORKED = {
    # (3/4 * 0.25^2 / 0.25 + 1/4 * 0.75^2 / 0.75) * 10
    # gradient: (3/4 * 2 * 0.25 * (-1/4) / 0.25 + 1/4 * 2 * 0.75 * (1/4) / 0.75) * 10, dx0(v+)/dv = -sigma mix = -1/4
    True: (3.75, -2.5),
    # (3/4 * 0.5^2 + 1/4 * 1.5^2) * 10; gradient: (3/4 * 2 * (-0.5) * 1/2 + 1/4 * 2 * (-1.5) * (-1/2)) * 10
    False: (7.5, 0.0),
}


@pytest.mark.parametrize("normalise", [True, False])
def test_policy_loss_of_one_number(normalise):
    value, slope = HAND_WORKED[normalise]
    velocity = one(2).requires_grad_()
    loss = losses.policy_loss(
        velocity, one(1), one(2), one(1), torch.tensor([[0.5]]), torch.tensor([[0.75]]),
        policy_mix=0.5, clip=5.0, normalise=normalise,
    )  # fmt: skip
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([value])
    assert velocity.grad.item() == pytest.approx(slope, abs=1e-6)


def test_each_sample_is_normalised_by_its_own_error():
    generator = torch.Generator().manual_seed(0)
    velocity, old, noisy, x0 = (torch.randn(2, 3, 2, 4, 4, generator=generator) for _ in range(4))
    x0[1] *= 100
    arguments = (velocity, old, noisy, x0, torch.rand(2, 3, generator=generator), torch.tensor([[0.3], [0.9]]))
    options = {"policy_mix": 0.1, "clip": 5.0, "normalise": True}
    alone = [losses.policy_loss(*(a[row : row + 1] for a in arguments), **options) for row in range(2)]
    torch.testing.assert_close(losses.policy_loss(*arguments, **options), torch.cat(alone))


@pytest.mark.parametrize("normalise", [True, False])
def test_each_frame_has_its_weight(normalise):
    def gradient(*weights):
        return policy_case(list(weights), normalise=normalise)[-1]

    good, bad, mixed = gradient(1, 1, 1), gradient(0, 0, 0), gradient(1, 0, 1)
    torch.testing.assert_close(mixed[:, ::2], good[:, ::2])
    torch.testing.assert_close(mixed[:, 1], bad[:, 1])


def test_a_perfect_prediction_divides_by_the_floor():
    velocity = one(2).requires_grad_()
    loss = losses.policy_loss(
        velocity, one(2), one(2), one(1), torch.tensor([[0.5]]), torch.tensor([[0.5]]),
        policy_mix=0.1, clip=5.0, normalise=True,
    )  # fmt: skip
    loss.sum().backward()
    assert loss.item() == 0
    assert velocity.grad.item() == 0


# The same numbers: v = 2 gives x0 1, v = 1 gives x0 1.5 and an error of 0.5; weight 3/4.
@pytest.mark.parametrize(
    # 3/4 * 0.5^2 / 0.5, 3/4 * 2 * 0.5 * (-1/2) / 0.5; 3/4 * (1 - 2)^2, 3/4 * 2 * (1 - 2)
    ("normalise", "value", "slope"), [(True, 0.375, -0.75), (False, 0.75, -1.5)]
)  # fmt: skip
def test_regression_loss_of_one_number(normalise, value, slope):
    velocity = one(1).requires_grad_()
    loss = losses.regression_loss(
        velocity, one(2), one(1), torch.tensor([[0.5]]), torch.tensor([[0.75]]), normalise=normalise
    )
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([value])
    assert velocity.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize("normalise", [True, False])
def test_regression_is_the_pull_of_the_forward_loss_where_nothing_is_mixed(normalise):
    generator = torch.Generator().manual_seed(0)
    velocity, noisy, x0 = (torch.randn(2, 3, 2, 4, 4, generator=generator) for _ in range(3))
    sigma, one_each = torch.rand(2, 3, generator=generator), torch.ones(2, 1)
    forward = losses.policy_loss(
        velocity, torch.zeros_like(velocity), noisy, x0, sigma, one_each, policy_mix=1.0, clip=1.0, normalise=normalise
    )
    found = losses.regression_loss(velocity, noisy, x0, sigma, 0.3 * one_each, normalise=normalise)
    torch.testing.assert_close(found, 0.3 * forward)


def test_prior_is_the_mean_squared_distance_of_each_sample():
    velocity = torch.tensor([[1.0, 2.0], [0.0, 0.0]]).reshape(2, 2, 1, 1, 1)
    reference = torch.tensor([[1.0, 0.0], [3.0, 4.0]]).reshape(2, 2, 1, 1, 1)
    assert losses.prior_loss(velocity, reference).tolist() == [2.0, 12.5]


@pytest.mark.parametrize("space", ["velocity", "x0"])
def test_flow_matching_is_zero_at_the_true_velocity(space):
    x0, noise, sigma = one(1), one(3), torch.tensor([[0.5]])
    assert losses.flow_matching_loss(noise - x0, x0, noise, sigma, space=space).item() == 0


def test_flow_matching_in_velocity_space():
    # The target is 3 - 1 = 2; the prediction 5 is 3 off.
    assert losses.flow_matching_loss(one(5), one(1), one(3), torch.tensor([[0.5]]), space="velocity").item() == 9


def test_flow_matching_in_x0_space_is_the_error_of_the_clean_prediction():
    generator = torch.Generator().manual_seed(0)
    velocity, x0, noise = (torch.randn(2, 3, 2, 4, 4, generator=generator) for _ in range(3))
    sigma = torch.rand(2, 3, generator=generator)
    predicted = x0_from_velocity(add_noise(x0, noise, sigma), velocity, sigma)
    expected = (predicted - x0).square().flatten(1).mean(1)
    torch.testing.assert_close(losses.flow_matching_loss(velocity, x0, noise, sigma, space="x0"), expected)
