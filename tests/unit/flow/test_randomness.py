"""Random numbers belong to (seed, stream, step, sample), not to the rank or the batch that holds a sample."""

import pytest
import torch

from afd_scale.flow.randomness import Randomness

# Of seed 0, stream "a", step 1, sample 2; torch's CPU generator.
PINNED_NORMAL = [0.3950038, -2.3849425]
PINNED_UNIFORM = [0.2220153, 0.5209550]


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_a_sample_has_the_same_numbers_however_samples_are_grouped(kind):
    draw = getattr(Randomness(3), kind)
    together = draw("rollout", 5, [4, 9, 11, 2], (3, 2))
    assert together.shape == (4, 3, 2)
    assert together.dtype == torch.float32
    ranks = torch.cat([draw("rollout", 5, [11], (3, 2)), draw("rollout", 5, [2, 4, 9], (3, 2))])
    assert torch.equal(ranks, together[[2, 3, 0, 1]])


def test_seed_stream_step_and_sample_each_change_the_numbers():
    draws = [
        Randomness(seed).normal(stream, step, [sample], (4,))
        for seed in (0, 1)
        for stream in ("noise", "renoise")
        for step in (-1, 0, 1, 12)
        for sample in (0, 1, 2, 21)
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)


def test_numbers_are_the_same_in_every_run():
    # A resumed run draws again what it drew before it was killed: another key or generator breaks that.
    assert Randomness(0).normal("a", 1, [2], (2,)).flatten().tolist() == pytest.approx(PINNED_NORMAL, abs=1e-6)
    assert Randomness(0).uniform("a", 1, [2], (2,)).flatten().tolist() == pytest.approx(PINNED_UNIFORM, abs=1e-6)


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    Randomness(0).normal("noise", 1, [0, 1], (8,))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_moments():
    normal = Randomness(0).normal("noise", 1, range(200), (100,))
    assert abs(normal.mean().item()) < 0.03  # 4 standard errors of 20,000 draws
    assert abs(normal.std().item() - 1) < 0.02
    assert abs((normal[1:] * normal[:-1]).mean().item()) < 0.03, "neighbouring samples are correlated"
    uniform = Randomness(0).uniform("noise", 1, range(200), (100,))
    assert 0 <= uniform.min() < 1e-3
    assert 0.999 < uniform.max() < 1
    assert abs(uniform.mean().item() - 0.5) < 0.01
