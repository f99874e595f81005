"""Adapters beside a linear: named, passed as an argument, and nothing else of the linear changes."""

import pytest
import torch
from torch import nn

from afd_scale.engines.shards import merged_weights
from afd_scale.layers.lora import Adapters, adapted, adapter_of
from afd_scale.layers.ops import ModelOps
from afd_scale.models.wan import CausalWan
from tests.networks import make_policy

TINY = {"dim": 16, "ffn_dim": 32, "num_heads": 2, "num_layers": 2, "freq_dim": 8, "text_dim": 4, "text_length": 2,
        "latent_channels": 2, "prediction": "velocity"}  # fmt: skip


def make_linear() -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(3, 2)
    Adapters(("student", "old_policy"), rank=1, scale=2.0).attach(linear, 3, 2)
    return linear


def test_a_hand_worked_product() -> None:
    linear = make_linear()
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    product = linear.adapters["student"]
    product.down.data = torch.tensor([[1.0, 0.0, -1.0]])
    product.up.data = torch.tensor([[3.0], [5.0]])
    x = torch.tensor([[4.0, 9.0, 1.0]])  # down x = 3, scale 2
    assert adapted(linear, x, "student").tolist() == [[18.0, 30.0]]
    assert adapted(linear, x, "old_policy").tolist() == [[0.0, 0.0]], "a new adapter changes nothing"
    assert adapted(linear, x, None).tolist() == [[0.0, 0.0]]


def test_an_adapter_that_is_not_there_is_an_error() -> None:
    with pytest.raises(KeyError):
        adapted(make_linear(), torch.zeros(1, 3), "reference")


def test_names_tell_the_base_from_adapters() -> None:
    names = dict(make_linear().named_parameters())
    assert [name for name in names if adapter_of(name) is None] == ["weight", "bias"]
    assert [name for name in names if adapter_of(name) == "student"] == [
        "adapters.student.down", "adapters.student.up"
    ]  # fmt: skip


def make_student() -> CausalWan:
    torch.manual_seed(0)
    adapters = Adapters(("student", "old_policy"), rank=3, scale=0.5)
    model = make_policy(TINY, ModelOps(adapters=adapters))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.2)
    return model


def test_the_base_has_the_keys_of_a_plain_student() -> None:
    plain = make_policy(TINY).state_dict()
    assert {name for name in make_student().state_dict() if adapter_of(name) is None} == plain.keys()


@pytest.mark.parametrize("adapter", ["student", "old_policy", None])
@pytest.mark.parametrize("clean_gradient", [True, False])
def test_merged_weights_compute_what_base_and_adapter_do(adapter: str | None, clean_gradient: bool) -> None:
    model, plain = make_student(), make_policy(TINY)
    plain.load_state_dict(dict(merged_weights(model, adapter, lambda name, parameter: parameter.detach().clone())))
    noisy, clean = torch.randn(2, 1, 3, 2, 4, 4).expand(2, 2, 3, 2, 4, 4)
    timestep, text = torch.full((2, 3), 400.0), torch.randn(2, 2, 4)
    options = {"clean": clean, "clean_gradient": clean_gradient}
    found = model(noisy, timestep, text, adapter=adapter, **options)
    torch.testing.assert_close(found, plain(noisy, timestep, text, **options), rtol=1e-4, atol=1e-5)
    others = {"student", "old_policy", None} - {adapter}
    for other in others:
        assert (found - model(noisy, timestep, text, adapter=other, **options)).abs().max() > 1e-3


def test_gradients_reach_the_named_adapter_only() -> None:
    model = make_student()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(adapter_of(name) == "student")
    noisy = torch.randn(1, 2, 2, 4, 4)
    model(noisy, torch.full((1, 2), 400.0), torch.randn(1, 2, 4), adapter="student").square().mean().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {name for name, _ in model.named_parameters() if adapter_of(name) == "student"}
