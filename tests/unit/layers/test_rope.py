"""Rotation against its definition: each pair of channels is a complex number that turns by position x frequency."""

import cmath

import pytest
import torch

from afd_scale.layers.rope import Rotation, _Rotate

CPU = torch.device("cpu")


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def turn(rotation, x):
    """As queries and as keys, which turn alike."""
    q, k = rotation(x, x)
    assert torch.equal(q, k)
    return q


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
    rotated = turn(Rotation((range(3, 5),), 2, rows, columns, head_dim, CPU), x)
    positions = [(f, r, c) for f in frames for r in range(rows) for c in range(columns)]
    for batch, token, head in ((0, 0, 0), (0, 5, 1), (1, 6, 0), (1, 11, 1), (0, 17, 0), (1, 23, 1)):
        expected = rotate_one(x[batch, token, head].double(), positions[token]).float()
        torch.testing.assert_close(rotated[batch, token, head], expected, rtol=1e-5, atol=1e-5)


def test_the_first_token_stays_and_no_token_changes_its_length():
    x = random(1, 12, 2, 24)
    rotated = turn(Rotation((range(2),), 1, 2, 3, 24, CPU), x)
    assert torch.equal(rotated[:, 0], x[:, 0])
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    assert (rotated - x)[:, 1:].abs().amax(dim=(2, 3)).min() > 0.1


def test_scores_depend_on_relative_positions_only():
    q, k = random(2, 1, 12, 1, 24)
    here, later = (Rotation((range(first, first + 2),), 1, 2, 3, 24, CPU) for first in (0, 7))

    def scores(rotation):
        return torch.einsum("bqnd,bknd->bqk", *rotation(q, k))

    torch.testing.assert_close(scores(later), scores(here), rtol=1e-4, atol=1e-4)
    assert (torch.einsum("bqnd,bknd->bqk", later(q, k)[0], here(q, k)[1]) - scores(here)).abs().max() > 0.1


def test_a_far_position_keeps_its_precision():
    x = random(1, 1, 1, 24)
    expected = rotate_one(x[0, 0, 0].double(), (9999, 0, 0)).float()
    rotated = turn(Rotation((range(9999, 10000),), 1, 1, 1, 24, CPU), x)
    torch.testing.assert_close(rotated[0, 0, 0], expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_rotated_in_float32():
    x = random(1, 12, 2, 24, dtype=torch.bfloat16)
    rotation = Rotation((range(2),), 1, 2, 3, 24, CPU)
    assert torch.equal(turn(rotation, x), turn(rotation, x.float()).bfloat16())


def test_keys_are_written_into_their_room():
    q, k = random(2, 1, 12, 1, 24)
    rotation, buffer = Rotation((range(2),), 1, 2, 3, 24, CPU), torch.zeros(1, 20, 1, 24)
    room = buffer[:, 4:16]
    turned_q, turned_k = rotation(q, k, room)
    assert turned_k is room
    for ours, expected in zip((turned_q, buffer[:, 4:16]), rotation(q, k), strict=True):
        assert torch.equal(ours, expected)
    assert not buffer[:, :4].any()
    assert not buffer[:, 16:].any()


def test_the_operator_for_gpus_computes_the_same():
    """Where there is no GPU its plain form runs; test_rope_kernel has Triton's interpreter, tests/gpu the kernel."""
    q, k = random(2, 1, 12, 2, 24)
    rotation = Rotation((range(2),), 1, 2, 3, 24, CPU)
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    torch.ops.afd_scale.rotate(q, k, rotation.turns, q_out, k_out)
    for ours, expected in zip((q_out, k_out), rotation(q, k), strict=True):
        assert torch.equal(ours, expected)


def test_a_gradient_is_rotated_back():
    q, k = random(2, 1, 12, 2, 24, dtype=torch.float64)
    rotation = Rotation((range(2),), 1, 2, 3, 24, CPU)
    inputs = [q.requires_grad_(), k.requires_grad_()]
    weights = random(2, 1, 12, 2, 24, dtype=torch.float64).flip(0)

    def gradients(outputs):
        return torch.autograd.grad(sum((w * y).sum() for w, y in zip(weights, outputs, strict=True)), inputs)

    by_hand, by_torch = gradients(_Rotate.apply(q, k, rotation.turns)), gradients(rotation(q, k))
    for ours, expected in zip(by_hand, by_torch, strict=True):
        torch.testing.assert_close(ours, expected)
