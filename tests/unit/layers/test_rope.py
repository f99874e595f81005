"""Rotation against its definition: each pair of channels is a complex number that turns by position x frequency."""

import cmath

import pytest
import torch

from afd_scale.layers.rope import Rotation

CPU = torch.device("cpu")


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def rotate_one(x, position):
    """One head of one token, (D,), at (frame, row, column): number by number."""
    pairs = len(x) // 2
    split = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    turned, first = [], 0
    for place, count in zip(position, split, strict=True):
        for j in range(count):
            pair = complex(*x[2 * (first + j) : 2 * (first + j) + 2].tolist())
            pair *= cmath.exp(1j * place * 10000 ** (-j / count))
            turned += [pair.real, pair.imag]
        first += count
    return torch.tensor(turned, dtype=x.dtype)


@pytest.mark.parametrize("head_dim", [2, 6, 10, 24, 128])
def test_complex_number_definition(head_dim):
    frames, rows, columns = (3, 4, 3, 4), 3, 2  # several states of a video repeat its positions
    x = random(2, len(frames) * rows * columns, 2, head_dim)
    rotated = Rotation(range(3, 5), 2, rows, columns, head_dim, CPU)(x)
    positions = [(f, r, c) for f in frames for r in range(rows) for c in range(columns)]
    for batch, token, head in ((0, 0, 0), (0, 5, 1), (1, 6, 0), (1, 11, 1), (0, 17, 0), (1, 23, 1)):
        expected = rotate_one(x[batch, token, head].double(), positions[token]).float()
        torch.testing.assert_close(rotated[batch, token, head], expected, rtol=1e-5, atol=1e-5)


def test_the_first_token_stays_and_no_token_changes_its_length():
    x = random(1, 12, 2, 24)
    rotated = Rotation(range(2), 1, 2, 3, 24, CPU)(x)
    assert torch.equal(rotated[:, 0], x[:, 0])
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    assert (rotated - x)[:, 1:].abs().amax(dim=(2, 3)).min() > 0.1


def test_scores_depend_on_relative_positions_only():
    q, k = random(2, 1, 12, 1, 24)
    here, later = (Rotation(range(first, first + 2), 1, 2, 3, 24, CPU) for first in (0, 7))

    def scores(rotation):
        return torch.einsum("bqnd,bknd->bqk", rotation(q), rotation(k))

    torch.testing.assert_close(scores(later), scores(here), rtol=1e-4, atol=1e-4)
    assert (torch.einsum("bqnd,bknd->bqk", later(q), here(k)) - scores(here)).abs().max() > 0.1


def test_a_far_position_keeps_its_precision():
    x = random(1, 1, 1, 24)
    expected = rotate_one(x[0, 0, 0].double(), (9999, 0, 0)).float()
    rotated = Rotation(range(9999, 10000), 1, 1, 1, 24, CPU)(x)
    torch.testing.assert_close(rotated[0, 0, 0], expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_rotated_in_float32():
    x = random(1, 12, 2, 24, dtype=torch.bfloat16)
    rotation = Rotation(range(2), 1, 2, 3, 24, CPU)
    assert torch.equal(rotation(x), rotation(x.float()).bfloat16())
