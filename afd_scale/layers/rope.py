"""3D rotary position embedding of Wan 2.1: head_dim / 2 complex pairs split over (frame, row, column)."""

import torch
from torch import Tensor

BASE = 10000.0


class Rotation:
    """Angles of one grid of tokens.

    Args:
        frames: absolute positions of the latent frames.
        repeats: the frames stand so many times one after the other, at the same positions.
        rows, columns: of tokens in a frame.
        head_dim: width of a head; its c = head_dim / 2 pairs split (c - 2 (c // 3), c // 3, c // 3).
    """

    def __init__(self, frames: range, repeats: int, rows: int, columns: int, head_dim: int, device: torch.device):
        self.tokens_per_frame = rows * columns
        pairs = head_dim // 2
        spatial = pairs // 3
        grid = (repeats * len(frames), rows, columns)
        angles = []
        for axis, count in enumerate((pairs - 2 * spatial, spatial, spatial)):
            frequency = BASE ** -(torch.arange(count, dtype=torch.float64, device=device) / max(count, 1))
            first, last = (frames.start, frames.stop) if axis == 0 else (0, grid[axis])
            position = torch.arange(first, last, dtype=torch.float64, device=device)  # made there: nothing is copied
            position = position.repeat(repeats) if axis == 0 else position
            shape = [1, 1, 1, count]
            shape[axis] = grid[axis]
            angles.append((position[:, None] * frequency).view(shape).expand(*grid, count))
        angle = torch.cat(angles, dim=-1).flatten(0, 2)[None, :, None, :]  # (1, L, 1, head_dim / 2)
        self.cos, self.sin = angle.cos().float(), angle.sin().float()

    def __call__(self, x_BLND: Tensor) -> Tensor:
        """Rotate neighbouring pairs (x[2i], x[2i + 1]) of every head; cos and sin lift it to float32 at least."""
        pairs = x_BLND.unflatten(-1, (-1, 2))
        real, imaginary = pairs.unbind(-1)
        rotated = (real * self.cos - imaginary * self.sin, real * self.sin + imaginary * self.cos)
        return torch.stack(rotated, dim=-1).flatten(-2).to(x_BLND.dtype)
