"""Merging in bf16: what is too small for the last place counts on average, the same on all ranks and in all phases."""

import torch

from afd_scale.engines.twin import round_to_bfloat16


def test_a_small_change_is_there_on_average():
    weight = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    change = weight.abs() * 2**-12  # a sixteenth to a thirtysecond of a unit in the last place
    assert torch.equal((weight + change).bfloat16().float(), weight), "rounded to the nearest it is lost"
    rounded = round_to_bfloat16(weight + change, seed=1).float()
    assert ((rounded == weight) | (rounded > weight)).all(), "to a neighbour above or not at all"
    assert ((rounded - weight).sum() / change.sum() - 1).abs() < 0.01


def test_what_bfloat16_has_stays_and_rounding_repeats():
    x = torch.tensor([0.0, -0.0, 1.0, -2.5, 3e38, 1e-30]).bfloat16().float()
    assert torch.equal(round_to_bfloat16(x, seed=1).float(), x)
    x = torch.randn(100, 100)
    assert torch.equal(round_to_bfloat16(x, seed=1), round_to_bfloat16(x, seed=1))
    assert not torch.equal(round_to_bfloat16(x, seed=1), round_to_bfloat16(x, seed=2))
    error = (round_to_bfloat16(x, seed=1).float() - x).abs() / x.abs()
    assert error.max() < 2**-7
