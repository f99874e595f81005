"""The glue around Transformer Engine, on a stand-in for the library: rows, state, regions. The library itself is tried
in tests/gpu."""

import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from afd_scale.layers.choose_precision import choose_precision

GPU = torch.device("cuda", 0)


class Linear(nn.Linear):
    """As te.Linear 2.20: particular about rows and where it runs, with a state of its own."""

    multiple = 16
    region: object = None
    forward_regions: list[object] = []

    def __init__(self, in_features, out_features, init_method=None):
        super().__init__(in_features, out_features)
        init_method(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        assert x.shape[:-1].numel() % Linear.multiple == 0
        Linear.forward_regions.append(Linear.region)
        return super().forward(x)

    def get_extra_state(self):
        return torch.ones(3)

    def set_extra_state(self, state):
        raise AssertionError("no state to set")


@contextmanager
def autocast(enabled, recipe):
    Linear.region = recipe
    yield
    left_with_gradients.append(torch.is_grad_enabled())
    Linear.region = None


def checkpoint(function, *arguments, use_reentrant):
    assert use_reentrant
    checkpointed.append(Linear.region)
    return function(*arguments)


left_with_gradients: list[bool] = []
checkpointed: list[object] = []


RECIPES = {
    "current": "Float8CurrentScaling",
    "delayed": "DelayedScaling",
    "block": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
    "nvfp4": "NVFP4BlockScaling",
}
CHECKS = ["is_fp8_available", "is_fp8_block_scaling_available", "is_mxfp8_available", "is_nvfp4_available"]


@pytest.fixture
def library(monkeypatch):
    able = dict.fromkeys(CHECKS, lambda return_reason: (True, ""))
    pytorch = SimpleNamespace(Linear=Linear, autocast=autocast, checkpoint=checkpoint, **able)
    modules = {"": {}, ".pytorch": vars(pytorch), ".common": {}}
    modules[".common.recipe"] = {name: lambda scaling=scaling, **options: scaling for scaling, name in RECIPES.items()}
    modules[".common.recipe"]["DelayedScaling"] = lambda reduce_amax: "delayed"
    for name, members in modules.items():
        module = ModuleType("transformer_engine" + name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    sys.modules["transformer_engine"].pytorch = sys.modules["transformer_engine.pytorch"]
    Linear.forward_regions.clear()
    left_with_gradients.clear()
    checkpointed.clear()
    return sys.modules["transformer_engine.pytorch"]


@pytest.mark.parametrize("leading", [(16,), (1,), (3, 5), (2, 8), (1, 17)])
@pytest.mark.parametrize(("scaling", "multiple"), [("current", 16), ("block", 16), ("mxfp8", 32), ("nvfp4", 32)])
def test_any_number_of_rows(library, monkeypatch, leading, scaling, multiple):
    monkeypatch.setattr(Linear, "multiple", multiple)
    linear = choose_precision("fp8", scaling, GPU).linear(32, 48)
    x = torch.randn(*leading, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = nn.functional.linear(x, linear.weight, linear.bias)
    y = linear(x)
    torch.testing.assert_close(y, expected)
    of = (x, linear.weight, linear.bias)
    for ours, reference in zip(
        torch.autograd.grad(y.square().sum(), of), torch.autograd.grad(expected.square().sum(), of), strict=True
    ):
        torch.testing.assert_close(ours, reference)


def test_its_state_is_that_of_a_plain_linear(library):
    linear = choose_precision("fp8", "current", GPU).linear(32, 48)
    plain = nn.Linear(32, 48)
    assert list(linear.state_dict()) == ["weight", "bias"]
    linear.load_state_dict(plain.state_dict())
    plain.load_state_dict(linear.state_dict())


def test_it_begins_as_the_models_let_linears_begin(library):
    linear = choose_precision("fp8", "current", GPU).linear(32, 48)
    bound = (6 / (32 + 48)) ** 0.5
    assert 0.95 * bound < linear.weight.abs().max() <= bound
    assert not linear.bias.any()


@pytest.mark.parametrize("scaling", RECIPES)
@pytest.mark.parametrize("recompute", ["full", "keep_attention", "none"])
def test_blocks_run_in_a_region_when_recomputed_too(library, scaling, recompute):
    precision = choose_precision("fp8", scaling, GPU)
    linear, x = precision.linear(32, 32), torch.randn(16, 32).requires_grad_()
    precision.run_block(linear, x, recompute=recompute).square().sum().backward()
    again = recompute != "none" and scaling != "delayed"  # the stand-in of te.checkpoint does not recompute
    assert Linear.forward_regions == [scaling] * (2 if again else 1)
    assert checkpointed == (["delayed"] if recompute != "none" and scaling == "delayed" else [])
    assert x.grad is not None


def test_without_gradient_scales_follow_and_no_graph_is_kept(library):
    precision = choose_precision("fp8", "delayed", GPU)
    linear, x = precision.linear(32, 32), torch.randn(16, 32)
    with torch.no_grad():
        y = precision.run_block(linear, x, recompute="full")
        assert not torch.is_grad_enabled()
    assert not y.requires_grad
    assert checkpointed == []
    assert left_with_gradients == [True]


def test_a_gpu_without_fp8_is_refused(library, monkeypatch):
    monkeypatch.setattr(library, "is_fp8_available", lambda return_reason: (False, "compute capability 8.9 or higher"))
    with pytest.raises(ValueError, match=r"^precision \(fp8\) must be bf16 on this GPU: compute capability 8.9"):
        choose_precision("fp8", "current", GPU)


@pytest.mark.parametrize(("scaling", "check"), [
    ("block", "is_fp8_block_scaling_available"), ("mxfp8", "is_mxfp8_available"), ("nvfp4", "is_nvfp4_available"),
])  # fmt: skip
def test_a_recipe_that_the_gpu_cannot_is_refused(library, monkeypatch, scaling, check):
    monkeypatch.setattr(library, check, lambda return_reason: (False, "compute capability 10.0 or higher"))
    with pytest.raises(ValueError, match=rf"^fp8_scaling \({scaling}\) must be one that this GPU can, [^\n]*: comp"):
        choose_precision("fp8", scaling, GPU)
    choose_precision("fp8", "current", GPU)


@pytest.mark.parametrize("scaling", ["block", "mxfp8", "nvfp4"])
def test_a_recipe_that_the_library_does_not_have_is_refused(library, monkeypatch, scaling):
    monkeypatch.delattr(sys.modules["transformer_engine.common.recipe"], RECIPES[scaling])
    with pytest.raises(ValueError, match=rf"^fp8_scaling \({scaling}\) must be known to [^\n]*{RECIPES[scaling]}"):
        choose_precision("fp8", scaling, GPU)


def test_it_has_no_scale_for_each_row(library):
    with pytest.raises(ValueError, match=r"^fp8_scaling \(row\) must be one of current, [^\n]* on a GPU"):
        choose_precision("fp8", "row", GPU)


def test_kept_blocks_have_plain_linears(library):
    precision = choose_precision("fp8", "block", GPU, keep_blocks=1)
    kinds = [type(precision.of_block(index, 4).linear(32, 32)) is nn.Linear for index in range(4)]
    assert kinds == [True, False, False, True]


def test_a_library_that_cannot_start_is_refused(library, monkeypatch):
    """As without a GPU, or without a library of CUDA's: many lines, of which one is shown."""

    class Broken(ModuleType):
        def __getattr__(self, name):
            raise RuntimeError("no CUDA here\nand more")

    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", Broken("transformer_engine.common.recipe"))
    with pytest.raises(ValueError, match=r"^precision \(fp8\) must find Transformer Engine on a GPU: no CUDA here; in"):
        choose_precision("fp8", "current", GPU)
