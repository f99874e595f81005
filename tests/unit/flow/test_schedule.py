"""Noise levels: the warp and the sampler's steps."""

import pytest
import torch

from afd_scale.flow.schedule import denoising_sigmas, warp

STEPS = denoising_sigmas([1000, 750, 500, 250], shift=5.0)


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
