"""3D rotary position embedding of Wan 2.1: head_dim / 2 complex pairs split over (frame, row, column)."""

from copy import copy
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from afd_scale.layers.compiler import has_c_compiler

BASE = 10000.0


class Rotation:
    """Angles of one grid of tokens.

    Args:
        frames: positions of the latent frames, in runs one after the other.
        repeats: the frames stand so many times one after the other, at the same positions.
        rows, columns: of tokens in a frame.
        head_dim: width of a head; its c = head_dim / 2 pairs split (c - 2 (c // 3), c // 3, c // 3).

    Attributes:
        turns: (L, 1, head_dim / 2) complex: cos + i sin.
    """

    def __init__(
        self, frames: tuple[range, ...], repeats: int, rows: int, columns: int, head_dim: int, device: torch.device
    ):
        self.tokens_per_frame = rows * columns
        pairs = head_dim // 2
        spatial = pairs // 3
        grid = (repeats * sum(map(len, frames)), rows, columns)
        angles = []
        for axis, count in enumerate((pairs - 2 * spatial, spatial, spatial)):
            frequency = BASE ** -(torch.arange(count, dtype=torch.float64, device=device) / max(count, 1))
            runs = [torch.arange(run.start, run.stop, dtype=torch.float64, device=device)  # made there, not copied
                    for run in (frames if axis == 0 else (range(grid[axis]),))]  # fmt: skip
            position = torch.cat(runs) if len(runs) > 1 else runs[0]
            position = position.repeat(repeats) if axis == 0 else position
            shape = [1, 1, 1, count]
            shape[axis] = grid[axis]
            angles.append((position[:, None] * frequency).view(shape).expand(*grid, count))
        angle = torch.cat(angles, dim=-1).flatten(0, 2)[:, None, :]
        self.turns = torch.complex(angle.cos().float(), angle.sin().float())

    def __call__(self, q_BLND: Tensor, k_BLND: Tensor, k_room: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rotate neighbouring pairs (x[2i], x[2i + 1]) of every head, in float32 at least.

        Args:
            k_room: where the rotated keys are written, without gradient; None is anywhere.
        """
        if q_BLND.device.type != "cpu":
            return _rotate_at_once(q_BLND, k_BLND, self.turns, k_room)
        q_BLND, turned = _turn(q_BLND, self.turns), _turn(k_BLND, self.turns)
        return q_BLND, turned if k_room is None else k_room.copy_(turned)

    @property
    def angles(self) -> tuple[Tensor, ...]:
        """The buffers that a pass which is replayed reads them from."""
        return (self.turns,)

    def copied(self) -> "Rotation":
        """The same in buffers of its own."""
        other = copy(self)
        other.turns = self.turns.clone()
        return other


@dataclass(frozen=True)
class WindowRotation:
    """Queries of the current tokens, and keys of all that they see, which were kept as they are.

    Attributes:
        own, seen: of the current tokens, and of all keys in the order in which they stand.
    """

    own: Rotation
    seen: Rotation

    @property
    def tokens_per_frame(self) -> int:
        return self.own.tokens_per_frame

    @property
    def angles(self) -> tuple[Tensor, ...]:
        return self.own.turns, self.seen.turns

    def copied(self) -> "WindowRotation":
        return WindowRotation(self.own.copied(), self.seen.copied())

    def __call__(self, q_BLND: Tensor, k_BLND: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate queries and the window's keys, which are more; without gradient."""
        q_turns, k_turns = self.angles
        if q_BLND.device.type == "cpu":
            return _turn(q_BLND, q_turns), _turn(k_BLND, k_turns)
        q_out, k_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BLND, k_BLND))
        rotate_apart(q_BLND, k_BLND, q_turns, k_turns, q_out, k_out)
        return q_out, k_out


def _turn(x_BLND: Tensor, turns: Tensor) -> Tensor:
    wide = x_BLND.to(torch.promote_types(x_BLND.dtype, torch.float32))
    pairs = torch.view_as_complex(wide.reshape(*x_BLND.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).view(x_BLND.shape).to(x_BLND.dtype)


def _rotate_at_once(q: Tensor, k: Tensor, turns: Tensor, k_room: Tensor | None) -> tuple[Tensor, Tensor]:
    """One kernel, which reads and writes each number once."""
    if k_room is None:
        return _Rotate.apply(q, k, turns)
    q_out = torch.empty_like(q)
    rotate(q, k, turns, q_out, k_room)
    return q_out, k_room


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(turns)
        return _rotated(q, k, turns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor, Tensor, None]:
        (turns,) = ctx.saved_tensors
        return *_rotated(grad_q, grad_k, turns.conj().resolve_conj()), None


def _rotated(q: Tensor, k: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    q_out, k_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    rotate(q, k, turns, q_out, k_out)
    return q_out, k_out


@cache
def _has_triton() -> bool:
    """Triton, and the C compiler with which it makes a kernel's launcher."""
    return find_spec("triton") is not None and has_c_compiler()


@torch.library.custom_op("afd_scale::rotate", mutates_args=("q_out", "k_out"))
def rotate(q: Tensor, k: Tensor, turns: Tensor, q_out: Tensor, k_out: Tensor) -> None:
    """Rotate queries and keys into given tensors; (B, L, N, D) each, in any strides whose last is 1."""
    if q.dtype == torch.float64 or not q.is_cuda or not _has_triton():
        q_out.copy_(_turn(q, turns))
        k_out.copy_(_turn(k, turns))
        return
    from afd_scale.layers.rope_kernel import launch  # Triton comes with torch's builds for GPUs alone

    angles = torch.view_as_real(turns)
    launch(q, k, angles, angles, q_out, k_out)


@rotate.register_fake
def _(q: Tensor, k: Tensor, turns: Tensor, q_out: Tensor, k_out: Tensor) -> None:
    return None


@torch.library.custom_op("afd_scale::rotate_apart", mutates_args=("q_out", "k_out"))
def rotate_apart(q: Tensor, k: Tensor, q_turns: Tensor, k_turns: Tensor, q_out: Tensor, k_out: Tensor) -> None:
    """The same of queries and keys of other tokens, (B, L, N, D) and (B, K, N, D), each by its own angles."""
    if q.dtype == torch.float64 or not q.is_cuda or not _has_triton():
        q_out.copy_(_turn(q, q_turns))
        k_out.copy_(_turn(k, k_turns))
        return
    from afd_scale.layers.rope_kernel import launch

    launch(q, k, torch.view_as_real(q_turns), torch.view_as_real(k_turns), q_out, k_out)


@rotate_apart.register_fake
def _(q: Tensor, k: Tensor, q_turns: Tensor, k_turns: Tensor, q_out: Tensor, k_out: Tensor) -> None:
    return None
