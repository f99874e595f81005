"""Parameter counts equal those of the networks, built on the meta device."""

from pathlib import Path

import pytest
import torch

from afd_scale.config import load_config
from afd_scale.planning.parameters import block_parameters, discriminator_size, student_size
from tests.unit.planning.networks import build_discriminator, build_student, make_config

CONFIGS = Path(__file__).parents[3] / "configs"


def check(config) -> None:
    with torch.device("meta"):
        student, discriminator = build_student(config), build_discriminator(config)
    for network, size in ((student, student_size(config)), (discriminator, discriminator_size(config))):
        assert size.total == sum(p.numel() for p in network.parameters())
        assert size.trained == sum(p.numel() for p in network.parameters() if p.requires_grad)
        if network.units():
            assert size.unit == sum(p.numel() for p in network.units()[0].parameters())
            assert size.unit_trained == sum(p.numel() for p in network.units()[0].parameters() if p.requires_grad)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("shape", ["narrow", "wide"])
def test_counts_equal_the_built_networks(shape, lora):
    check(make_config(shape, lora=lora))


@pytest.mark.parametrize(
    "path", [*sorted(CONFIGS.glob("wan_*/*.yaml")), CONFIGS / "toy/afd.yaml"], ids=lambda p: p.stem
)
def test_counts_equal_the_built_networks_of_configs(path):
    check(load_config(path))


def test_a_block_worked_by_hand():
    config = make_config("narrow").student.model_copy(update={"dim": 2, "ffn_dim": 3})
    # Eight linears 2 x 2 + 2, four norms of 2; 2 x 3 + 3 and 3 x 2 + 2; norm3 of 2 + 2; modulation 6 x 2.
    assert block_parameters(config) == 8 * 6 + 4 * 2 + 9 + 8 + 4 + 12


def test_sft_has_no_discriminator_and_an_adapter_for_its_average():
    config = load_config(CONFIGS / "toy/base.yaml", ["student.lora={rank: 4}"])
    assert discriminator_size(config) is None
    assert student_size(config).num_adapters == 1
    averaged = load_config(CONFIGS / "toy/base.yaml", ["student.lora={rank: 4}", "method.ema_decay=0.9"])
    assert student_size(averaged).num_adapters == 2
