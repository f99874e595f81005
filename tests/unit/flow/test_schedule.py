"""Noise levels: the warp, the sampler's steps, the draws for training."""

import pytest
import torch

from afd_scale.flow.randomness import Randomness
from afd_scale.flow.schedule import SigmaDraw, denoising_sigmas, warp

STEPS = denoising_sigmas([1000, 750, 500, 250], shift=5.0)
FIRST_STEPS = denoising_sigmas([1000, 900, 800, 700, 600], shift=1.0)  # of which none but 1 is of the others


def draw(
    name, *, samples=range(4), num_chunks=3, step=1, shift=5.0, mean=0.0, deviation=1.0, chunk_frames=1,
    first_steps=STEPS,
):  # fmt: skip
    samples = list(samples)
    latents = torch.empty(len(samples), num_chunks * chunk_frames, 1, 1, 1)
    sigma_draw = SigmaDraw(name, STEPS, first_steps, shift, mean, deviation, chunk_frames)
    return sigma_draw(Randomness(0), "sigma", step, samples, latents)


def test_wan_steps_under_shift_5():
    # 5 * 0.5 / (1 + 4 * 0.5) = 2.5 / 3
    assert STEPS.dtype == torch.float32
    assert (STEPS * 1000).tolist() == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_warp_keeps_the_ends_and_is_undone_by_the_inverse_shift(shift):
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    warped = warp(sigma, shift)
    assert warped[[0, -1]].tolist() == [0, 1]
    assert (warped.diff() > 0).all()
    assert (warped >= sigma).all()
    torch.testing.assert_close(warp(warped, 1 / shift), sigma)


def test_steps_are_drawn_equally_often():
    sigma = draw("steps", samples=range(1000), num_chunks=4)
    assert sigma.shape == (1000, 4)
    counts = [(sigma == step).sum().item() for step in STEPS]
    assert sum(counts) == 4000
    assert all(900 < count < 1100 for count in counts)  # 1000 +- 3.6 standard deviations


def test_the_first_chunk_is_drawn_from_its_own_steps():
    sigma = draw("steps", samples=range(1000), num_chunks=3, chunk_frames=2, first_steps=FIRST_STEPS)
    counts = [(sigma[:, 0] == step).sum().item() for step in FIRST_STEPS]
    assert sum(counts) == 1000
    assert all(150 < count < 250 for count in counts)  # 200 +- 4 standard deviations
    assert torch.equal(sigma[:, 1], sigma[:, 0]), "both frames of the first chunk"
    plain = draw("steps", samples=range(1000), num_chunks=3, chunk_frames=2)
    assert torch.equal(sigma[:, 2:], plain[:, 2:]), "other chunks draw as without"


def test_uniform_is_the_uniform_stream():
    expected = Randomness(0).uniform("sigma", 1, range(4), (3,))
    assert torch.equal(draw("uniform"), expected)


def test_logit_normal_is_warped_sigmoid_of_a_normal():
    normal = Randomness(0).normal("sigma", 1, range(4), (3,))
    expected = 3 * torch.sigmoid(-0.5 + 2 * normal) / (1 + 2 * torch.sigmoid(-0.5 + 2 * normal))
    torch.testing.assert_close(draw("logit_normal", shift=3.0, mean=-0.5, deviation=2.0), expected)


@pytest.mark.parametrize("name", ["steps", "uniform", "logit_normal"])
def test_draws_lie_in_the_unit_interval_and_belong_to_their_sample(name):
    sigma = draw(name, samples=range(200))
    assert ((sigma >= 0) & (sigma <= 1)).all()
    assert torch.equal(draw(name, samples=[7, 3]), sigma[[7, 3]])
    assert not torch.equal(draw(name, samples=range(200), step=2), sigma)


def test_a_chunk_has_one_level():
    sigma = draw("uniform", chunk_frames=2)
    assert sigma.shape == (4, 6)
    assert torch.equal(sigma, draw("uniform").repeat_interleave(2, dim=1))
