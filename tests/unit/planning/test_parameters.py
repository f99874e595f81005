"""Parameter counts: a block worked by hand, and those of built networks, adapters and what trains beside them."""

from pathlib import Path

import pytest

from afd_scale.config import load_config
from afd_scale.planning.parameters import network_sizes
from tests.unit.planning.networks import build, make_config

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "config", [make_config("narrow"), load_config(CONFIGS / "toy/afd.yaml")], ids=["latent", "conv"]
)
def test_counts_equal_the_built_networks(config, lora):
    if lora:
        config = config.model_copy(update={"student": make_config("narrow", lora=True).student})
    for role in ("student", "discriminator"):
        network, size = build(config, role), network_sizes(config)[role]
        assert size.total == sum(p.numel() for p in network.parameters())
        assert size.trained == sum(p.numel() for p in network.parameters() if p.requires_grad)
        if network.units():
            assert size.unit == sum(p.numel() for p in network.units()[0].parameters())
            assert size.unit_trained == sum(p.numel() for p in network.units()[0].parameters() if p.requires_grad)


def test_a_block_worked_by_hand():
    student = {"dim": 4, "ffn_dim": 3, "num_heads": 2}
    config = load_config(CONFIGS / "toy/base.yaml", [f"student.{name}={size}" for name, size in student.items()])
    # Eight linears 4 x 4 + 4, four norms of 4; 4 x 3 + 3 and 3 x 4 + 4; norm3 of 4 + 4; modulation 6 x 4.
    assert network_sizes(config)["student"].unit == 8 * 20 + 4 * 4 + 15 + 16 + 8 + 24


def test_published_sizes():
    """Wan's releases in float32 are files of 5.68 GB and 57.2 GB."""
    for architecture, billions in (("wan-1.3b", 1.42), ("wan-14b", 14.29)):
        config = load_config(CONFIGS / "toy/base.yaml", [f"student={{architecture: {architecture}}}"])
        assert network_sizes(config)["student"].base / 1e9 == pytest.approx(billions, rel=0.01)


def test_adapters_are_those_of_the_roles_that_follow():
    sizes = network_sizes(make_config("narrow", lora=True))
    assert sizes["student"].num_adapters == 2, "its own and the old policy's; the reference is the base"
    assert sizes["reference"] == sizes["old_policy"] == sizes["student"]
    base = ["student.lora={rank: 4}"]
    assert network_sizes(load_config(CONFIGS / "toy/base.yaml", base))["student"].num_adapters == 1
    averaged = network_sizes(load_config(CONFIGS / "toy/base.yaml", [*base, "method.ema_decay=0.9"]))
    assert averaged.keys() == {"student", "average"}
    assert averaged["student"].num_adapters == 2


def test_copies_train_nothing():
    sizes = network_sizes(make_config("narrow"))
    assert sizes["old_policy"].total == sizes["reference"].total == sizes["student"].total
    assert sizes["old_policy"].trained == sizes["old_policy"].unit_trained == 0
