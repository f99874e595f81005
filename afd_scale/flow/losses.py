"""AFD's losses as pure functions. Policy losses return one value a sample (B,), so that the caller averages."""

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_scale.flow.process import expand_sigma, x0_from_velocity

NORMALISER_FLOOR = 1e-5  # DiffusionNFT's smallest x0 error to divide by


def per_sample_mean(x: Tensor) -> Tensor:
    """(B, ...) -> (B,)."""
    return x.flatten(1).mean(1)


def per_frame_mean(x: Tensor) -> Tensor:
    """(B, F, ...) -> (B, F)."""
    return x.flatten(2).mean(2)


def bradley_terry_loss(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """-log sigmoid(D(x_T, y) - D(x_S, y)), averaged over pairs of the same prompt."""
    return -F.logsigmoid(teacher_logits - student_logits).mean()


def softplus_loss(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """The non-saturating GAN loss of a discriminator that scores each video by itself."""
    return F.softplus(-teacher_logits).mean() + F.softplus(student_logits).mean()


def mismatch_loss(own_logits: Tensor, other_logits: Tensor, differs: Tensor, objective: str) -> Tensor:
    """A teacher's video is no video of another prompt: mean loss over prompts, 0 where the other prompt is the same.

    Args:
        own_logits, other_logits: (P,) of the videos under their own prompts and under others.
        differs: (P,) 1 where the other prompt is another one, else 0.
        objective: `bradley_terry` of the two, or `softplus` of the second.
    """
    each = -F.logsigmoid(own_logits - other_logits) if objective == "bradley_terry" else F.softplus(other_logits)
    return (each * differs).mean()


def generator_loss(student_logits: Tensor, teacher_logits: Tensor | None) -> Tensor:
    """(B,) what a student loses whose videos are told from the teacher's: -log sigmoid(D(x_S, y) - D(x_T, y)).

    Args:
        teacher_logits: (B,) of videos of the same prompts; None takes each of the student's by itself, against 0.
    Source: relativistic pairing GAN, arXiv:1807.00734; R3GAN, arXiv:2501.05441.
    """
    return F.softplus(-student_logits if teacher_logits is None else teacher_logits - student_logits)


def finite_difference_penalty(logits: Tensor, perturbed_logits: Tensor, deviation: float) -> Tensor:
    """R1 or R2 without double backward: the squared slope between a sample and its perturbed copy.

    Args:
        logits, perturbed_logits: (B,) of x and of x + deviation * noise.
    Source: the finite-difference penalty of APT, arXiv:2501.08316, sec. 3.3, divided by the squared step.
    """
    return ((perturbed_logits - logits) / deviation).square().mean()


def policy_loss(
    velocity: Tensor, old_velocity: Tensor, noisy: Tensor, x0: Tensor, sigma: Tensor, weight: Tensor,
    *, policy_mix: float, clip: float, normalise: bool,
) -> Tensor:  # fmt: skip
    """The forward-process policy loss of AFD on the student's own samples.

    With v+ = (1-b) v_old + b v and v- = (1+b) v_old - b v it weighs their clean predictions' errors by w and 1 - w, so
    that at v = v_old the gradient is proportional to (1 - 2w): towards good samples, away from bad ones.

    Args:
        velocity, old_velocity: (B, F, C, H, W) of the student (with gradient) and of the sampling policy.
        noisy, x0, sigma: the sample x_S noised to (B, F) levels, and itself.
        weight: in [0, 1], (B, F) of frames or (B, 1) of whole samples.
        normalise: divide a sample's errors by their own stop-gradient mean (x0 space); otherwise plain velocity errors.
    Returns:
        (B,) losses, scaled by clip / b.
    Source: DiffusionNFT, arXiv:2509.16117, eq. 8 and its released normalisation.
    """
    positive = (1 - policy_mix) * old_velocity + policy_mix * velocity
    negative = (1 + policy_mix) * old_velocity - policy_mix * velocity
    good, bad = (_error(v, noisy, x0, sigma, normalise) for v in (positive, negative))
    return (weight * good + (1 - weight) * bad).mean(1) * clip / policy_mix


def regression_loss(
    velocity: Tensor, noisy: Tensor, x0: Tensor, sigma: Tensor, weight: Tensor, *, normalise: bool
) -> Tensor:
    """The student's own samples as targets, each with a weight: all pull, none pushes.

    Args:
        velocity, noisy, x0, sigma, normalise: as in `policy_loss`.
        weight: not negative, as there.
    Returns:
        (B,) losses.
    Source: reward-weighted regression, Peters and Schaal, ICML 2007; for diffusion models arXiv:2302.12192.
    """
    return (weight * _error(velocity, noisy, x0, sigma, normalise)).mean(1)


def _error(velocity: Tensor, noisy: Tensor, x0: Tensor, sigma: Tensor, normalise: bool) -> Tensor:
    """(B, F) of each frame."""
    if normalise:
        return _normalised_x0_error(velocity, noisy, x0, sigma)
    target = (noisy - x0) / expand_sigma(sigma.clamp(min=1e-3))
    return per_frame_mean((velocity - target).square())


def _normalised_x0_error(velocity: Tensor, noisy: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    difference = x0_from_velocity(noisy, velocity, sigma) - x0
    with torch.no_grad():
        normaliser = per_sample_mean(difference.abs()).clamp(min=NORMALISER_FLOOR)
    return per_frame_mean(difference.square()) / normaliser[:, None]


def distribution_matching_gradient(x0: Tensor, real_x0: Tensor, fake_x0: Tensor) -> Tensor:
    """(B, F, C, H, W) by x0 of 0.5 |x0 - target|^2 whose target is fixed: from what the fake score makes of a noised x0
    to what the real score does, each sample in units of its distance to the latter.

    Source: DMD, arXiv:2311.18828, eq. 7 and 8.
    """
    distance = per_sample_mean((x0 - real_x0).abs()).clamp(min=NORMALISER_FLOOR)
    return (fake_x0 - real_x0) / distance[:, None, None, None, None]


def prior_loss(velocity: Tensor, reference_velocity: Tensor) -> Tensor:
    """(B,) mean squared distance to the frozen reference's velocity."""
    return per_sample_mean((velocity - reference_velocity).square())


def flow_matching_loss(velocity: Tensor, x0: Tensor, noise: Tensor, sigma: Tensor, *, space: str) -> Tensor:
    """(B,) flow-matching errors.

    Args:
        space: `velocity`, or `x0`, the same error times sigma squared, for a network that predicts x0.
    Source: Flow Matching, arXiv:2210.02747.
    """
    error = velocity - (noise - x0)
    if space == "x0":
        error = error * expand_sigma(sigma)
    return per_sample_mean(error.square())
