"""Which linears the networks of a run get."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from afd_scale.config import RunConfig
from afd_scale.layers.fp8_emulated import EmulatedFp8Linear
from afd_scale.training import build

SMALL = {"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "activation_checkpointing": True}


@pytest.fixture
def whole_networks(monkeypatch):
    """Neither shards nor engines: each network as it is made."""
    monkeypatch.setattr(build, "build_sharded", lambda config, make, state, counter: make())
    monkeypatch.setattr(build, "TrainedNetwork", lambda config, network, *arguments, **options: network)
    monkeypatch.setattr(build, "freeze", lambda config, network: network)
    for policy in ("AveragedPolicy", "ShardedNetwork"):
        monkeypatch.setattr(build, policy, lambda network, *arguments, **options: network)


def builder(precision):
    config = RunConfig.model_validate(
        {"method": {"name": "afd", "discriminator": {"name": "latent", **SMALL}}, "student": SMALL}
        | {"precision": precision}
    )
    alone = {"size": 1, "local_size": 1, "data_size": 1, "sequence": 1, "sequence_group": None}
    ranks = SimpleNamespace(device=torch.device("cpu"), any=bool, **alone)
    return build.Builder(config, ranks), config.method


@pytest.mark.parametrize(("precision", "kind"), [("fp32", nn.Linear), ("bf16", nn.Linear), ("fp8", EmulatedFp8Linear)])
def test_linears_of_blocks_and_no_others_are_in_fp8(whole_networks, precision, kind):
    made, method = builder(precision)
    student = made.student(())
    for network in (student, made.average(student, ""), made.reference(student), made.discriminator(method)):
        linears = {name: type(module) for name, module in network.named_modules() if isinstance(module, nn.Linear)}
        in_blocks = [type_ for name, type_ in linears.items() if name.startswith("blocks.")]
        assert in_blocks == [kind] * (2 * 10), "q, k, v, o of self- and cross-attention, two of the feed-forward"
        assert not {type_ for name, type_ in linears.items() if not name.startswith("blocks.")} & {EmulatedFp8Linear}
