"""Noise levels to train at: drawn from the sampler's steps or otherwise, chunk by chunk."""

import pytest
import torch

from afd_scale.config.methods.method import SigmaConfig
from afd_scale.config.sampler import SamplerConfig
from afd_scale.flow.randomness import Randomness
from afd_scale.flow.schedule import denoising_sigmas
from afd_scale.rollout.sampler import Sampler

TIMESTEPS = (1000, 750, 500, 250)
FIRST_TIMESTEPS = (1000, 900, 800, 700, 600)
STEPS = denoising_sigmas(TIMESTEPS, shift=5.0)
FIRST_STEPS = denoising_sigmas(FIRST_TIMESTEPS, shift=5.0)  # of which none but 1 is of the others


def draw(
    name, *, samples=range(4), num_chunks=3, step=1, shift=5.0, mean=0.0, deviation=1.0, chunk_frames=1,
    first_timesteps=None,
):  # fmt: skip
    sampler = Sampler(SamplerConfig(
        chunk_frames=chunk_frames, timesteps=TIMESTEPS, first_chunk_timesteps=first_timesteps, timestep_shift=shift,
    ))  # fmt: skip
    latents = torch.empty(len(samples), num_chunks * chunk_frames, 1, 1, 1)
    config = SigmaConfig(name=name, mean=mean, deviation=deviation)
    return sampler.draw_sigma(config, Randomness(0), "sigma", step, list(samples), latents)


def test_steps_are_drawn_equally_often():
    sigma = draw("steps", samples=range(1000), num_chunks=4)
    assert sigma.shape == (1000, 4)
    counts = [(sigma == step).sum().item() for step in STEPS]
    assert sum(counts) == 4000
    assert all(900 < count < 1100 for count in counts)  # 1000 +- 3.6 standard deviations


def test_the_first_chunk_is_drawn_from_its_own_steps():
    sigma = draw("steps", samples=range(1000), num_chunks=3, chunk_frames=2, first_timesteps=FIRST_TIMESTEPS)
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
