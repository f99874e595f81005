"""3D rotary position embedding of Wan 2.1: head_dim / 2 complex pairs split over (frame, row, column)."""

import torch
from torch import Tensor

BASE = 10000.0


class Rotation:
    """Angles of one grid of tokens.

    Args:
        grid: (frames, rows, columns) of tokens.
        head_dim: width of a head; its pairs split (c - 2 (c // 3), c // 3, c // 3) with c = head_dim / 2.
        first_frame: absolute position of the first frame.
    """

    def __init__(self, grid: tuple[int, int, int], head_dim: int, device: torch.device, first_frame: int = 0):
        pairs = head_dim // 2
        spatial = pairs // 3
        positions = [torch.arange(size, dtype=torch.float64, device=device) for size in grid]
        positions[0] += first_frame
        angles = []
        for axis, count in enumerate((pairs - 2 * spatial, spatial, spatial)):
            frequency = BASE ** -(torch.arange(count, dtype=torch.float64, device=device) / max(count, 1))
            shape = [1, 1, 1, count]
            shape[axis] = grid[axis]
            angles.append((positions[axis][:, None] * frequency).view(shape).expand(*grid, count))
        angle = torch.cat(angles, dim=-1).flatten(0, 2)[None, :, None, :]  # (1, L, 1, head_dim / 2)
        self.cos, self.sin = angle.cos().float(), angle.sin().float()

    def __call__(self, x_BLND: Tensor) -> Tensor:
        """Rotate neighbouring pairs (x[2i], x[2i + 1]) of every head; computed in float32 at least."""
        pairs = x_BLND.to(torch.promote_types(x_BLND.dtype, torch.float32)).unflatten(-1, (-1, 2))
        real, imaginary = pairs.unbind(-1)
        rotated = (real * self.cos - imaginary * self.sin, real * self.sin + imaginary * self.cos)
        return torch.stack(rotated, dim=-1).flatten(-2).to(x_BLND.dtype)
