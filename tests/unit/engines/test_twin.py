"""Merging in bf16: what is too small for the last place counts on average, the same on all ranks and in all phases."""

import torch

from afd_scale.engines.twin import Twin, round_to_bfloat16
from afd_scale.layers.lora import Adapters
from afd_scale.layers.ops import ModelOps
from tests.networks import make_policy

FIELDS = {"dim": 64, "ffn_dim": 128, "num_heads": 2, "num_layers": 1, "freq_dim": 16, "text_dim": 8, "text_length": 5,
          "latent_channels": 3, "prediction": "velocity"}  # fmt: skip


def make_network(names):
    adapters = Adapters(names, 4, 0.5) if names else None
    return make_policy(FIELDS, ModelOps(adapters=adapters)).bfloat16()


def test_a_young_adapter_is_in_the_merged_weights():
    source, name = make_network(("one", "other")), "blocks.0.ffn.0.weight"
    linear = source.blocks[0].ffn[0]
    adapter = linear.adapters["one"]
    torch.manual_seed(0)
    with torch.no_grad():
        linear.weight.fill_(1.0)
        adapter.down.fill_(2**-6)
        adapter.up.fill_(2**-6)  # 0.5 x 4 x 2**-12 is a sixteenth of the last place of 1
        linear.adapters["other"].up.fill_(100.0)
    twin = Twin(lambda: make_network(()), "one", sampling=True, dtype=torch.bfloat16)
    merged = twin._weight(source, name, linear.weight, torch.bfloat16)
    assert merged.dtype == torch.bfloat16
    assert ((merged.float() - 1).mean() / 2**-11 - 1).abs() < 0.1
    apart = Twin(lambda: make_network(("one",)), "one", sampling=False, dtype=torch.bfloat16)
    assert torch.equal(apart._weight(source, name, linear.weight, torch.bfloat16), linear.weight)


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
