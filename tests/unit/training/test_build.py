"""Which linears the networks of a run get, and what a cast becomes."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from afd_scale.config import RunConfig
from afd_scale.engines import sharded_kind
from afd_scale.engines.cast import build_cast
from afd_scale.engines.plain import Plain, PlainAverage, PlainNetwork, PlainTrained
from afd_scale.layers.fp8_emulated import EmulatedFp8Linear
from afd_scale.layers.lora import FOLDER

SMALL = {"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "activation_checkpointing": True}


def config_of(**fields):
    return RunConfig.model_validate(
        {"method": {"name": "afd", "discriminator": {"name": "latent", **SMALL}}, "student": SMALL} | fields
    )


@pytest.fixture
def whole_networks(monkeypatch):
    """Neither shards nor engines: each network as it is made."""
    monkeypatch.setattr(sharded_kind, "build_sharded", lambda config, make, state: make())
    monkeypatch.setattr(sharded_kind.GatherCounter, "watch", lambda counter, parameters: None)
    monkeypatch.setattr(sharded_kind, "TrainedNetwork", lambda config, network, *arguments, **options: network)
    monkeypatch.setattr(sharded_kind, "freeze", lambda config, network: network)
    for policy in ("AveragedPolicy", "ShardedNetwork"):
        monkeypatch.setattr(sharded_kind, policy, lambda network, *arguments, **options: network)


@pytest.mark.parametrize(("precision", "kind"), [("fp32", nn.Linear), ("bf16", nn.Linear), ("fp8", EmulatedFp8Linear)])
def test_linears_of_blocks_and_no_others_are_in_fp8(whole_networks, precision, kind):
    config = config_of(precision=precision)
    ranks = SimpleNamespace(device=torch.device("cpu"), any=bool, local_size=1, sequence_group=None)
    networks = build_cast(config, sharded_kind.Sharded(config, ranks, lambda role: None, cache_bytes=0))
    assert list(networks) == ["student", "old_policy", "reference", "discriminator"]
    for network in networks.values():
        linears = {name: type(module) for name, module in network.named_modules() if isinstance(module, nn.Linear)}
        in_blocks = [type_ for name, type_ in linears.items() if name.startswith("blocks.")]
        assert in_blocks == [kind] * (2 * 10), "q, k, v, o of self- and cross-attention, two of the feed-forward"
        assert not {type_ for name, type_ in linears.items() if not name.startswith("blocks.")} & {EmulatedFp8Linear}


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 2}])
def test_first_and_last_blocks_may_stay_out_of_fp8(lora):
    """Of students with adapters too, which their kept linears have all the same."""
    student = SMALL | {"num_layers": 5, "lora": lora}
    judge = {"name": "latent", **SMALL, "num_layers": 3}
    config = config_of(
        precision="fp8", fp8_keep_blocks=1, student=student, method={"name": "afd", "discriminator": judge}
    )
    student, discriminator = (
        build_cast(config, Plain(config, torch.device("cpu")))[role].network for role in ("student", "discriminator")
    )
    for network, in_fp8 in ((student, [1, 2, 3]), (discriminator, [1])):
        for index, block in enumerate(network.blocks):
            linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
            kind = EmulatedFp8Linear if index in in_fp8 else nn.Linear
            assert [type(linear) for linear in linears] == [kind] * 10
            assert all(hasattr(linear, FOLDER) == (lora is not None and network is student) for linear in linears)


def plain(config, state=None):
    return build_cast(
        config, Plain(config, torch.device("cpu"), lambda role: state if role.name == "student" else None)
    )


def test_roles_are_copies_of_the_start_or_adapters_of_one_base():
    engines = plain(config_of())
    kinds = {role: type(engine) for role, engine in engines.items()}
    assert kinds == {"student": PlainTrained, "old_policy": PlainAverage, "reference": PlainNetwork,
                     "discriminator": PlainTrained}  # fmt: skip
    student, old, reference = (engines[role].network for role in ("student", "old_policy", "reference"))
    assert len({id(network) for network in (student, old, reference)}) == 3
    for copy in (old, reference):
        assert all(torch.equal(a, b) for a, b in zip(student.parameters(), copy.parameters(), strict=True))
        assert not any(p.requires_grad for p in copy.parameters())

    engines = plain(config_of(student={**SMALL, "lora": {"rank": 2}}))
    student, old, reference = (engines[role] for role in ("student", "old_policy", "reference"))
    assert student.network is old.network is reference.network
    assert (student.adapter, old.adapter, reference.adapter) == ("student", "old_policy", None)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), old.parameters(), strict=True))
    trained = {name for name, p in student.network.named_parameters() if p.requires_grad}
    assert trained
    assert all(".adapters.student." in name for name in trained)


def test_a_reference_of_adapters_that_start_from_a_lora_has_them_too():
    lora = {"rank": 2, "weights": "some.safetensors"}
    engines = plain(config_of(student={**SMALL, "weights": "base", "lora": lora}))
    student, old, reference = (engines[role] for role in ("student", "old_policy", "reference"))
    assert student.network is old.network is reference.network
    assert (student.adapter, old.adapter, reference.adapter) == ("student", "old_policy", "reference")
    assert not any(p.requires_grad for p in (*old.parameters(), *reference.parameters()))


def test_start_weights_reach_the_leader_and_its_copies():
    state = {
        name: torch.full_like(weight, 0.5)
        for name, weight in plain(config_of())["student"].network.state_dict().items()
    }
    engines = plain(config_of(), state)
    for role in ("student", "old_policy", "reference"):
        assert all((p == 0.5).all() for p in engines[role].network.parameters())
    assert not all((p == 0.5).all() for p in engines["discriminator"].network.parameters())


def test_an_adapted_judge_trains_its_score_too():
    judge = {"name": "latent", **SMALL, "lora": {"rank": 2}}
    network = plain(config_of(method={"name": "afd", "discriminator": judge}))["discriminator"].network
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == (".adapters.discriminator." in name or name == "score.weight"), name
