"""The forward process x_sigma = (1 - sigma) x0 + sigma noise, and its velocity noise - x0.

Throughout, latents are (B, F, C, H, W) and sigma is (B, F): one noise level for each latent frame.
"""

from torch import Tensor


def expand_sigma(sigma: Tensor) -> Tensor:
    """(B, F) -> (B, F, 1, 1, 1)."""
    return sigma[..., None, None, None]


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(B, F, C, H, W) noisy latents at (B, F) noise levels."""
    level = expand_sigma(sigma)
    return (1 - level) * x0 + level * noise


def x0_from_velocity(noisy: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """(B, F, C, H, W) clean latents that a velocity points to."""
    return noisy - expand_sigma(sigma) * velocity
