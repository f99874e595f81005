"""x_sigma = (1 - sigma) x0 + sigma noise, and back along the velocity noise - x0."""

import torch

from afd_scale.flow.process import add_noise, x0_from_velocity


def column(*values):
    """One sample whose frames are single values, (1, F, 1, 1, 1)."""
    return torch.tensor(values).reshape(1, -1, 1, 1, 1)


def test_each_frame_has_its_own_level():
    x0, noise, sigma = column(2.0, 2.0, 2.0), column(-1.0, -1.0, -1.0), torch.tensor([[0.0, 0.25, 1.0]])
    # 0.75 * 2 + 0.25 * -1 = 1.25
    assert add_noise(x0, noise, sigma).flatten().tolist() == [2.0, 1.25, -1.0]


def test_the_velocity_leads_back_to_x0():
    noisy, velocity, sigma = column(2.0, 1.25, -1.0), column(-3.0, -3.0, -3.0), torch.tensor([[0.0, 0.25, 1.0]])
    assert x0_from_velocity(noisy, velocity, sigma).flatten().tolist() == [2.0, 2.0, 2.0]


def test_samples_have_their_own_levels_too():
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 3, 4, 5, 6, generator=generator) for _ in range(2))
    sigma = torch.rand(2, 3, generator=generator)
    noisy = add_noise(x0, noise, sigma)
    for sample in range(2):
        for frame in range(3):
            level = sigma[sample, frame].item()
            expected = (1 - level) * x0[sample, frame] + level * noise[sample, frame]
            torch.testing.assert_close(noisy[sample, frame], expected)
    torch.testing.assert_close(x0_from_velocity(noisy, noise - x0, sigma), x0)
