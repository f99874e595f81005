"""A LoRA run's adapters compute the same in peft, in diffusers and merged; what those two write is read the same."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from afd_scale.checkpoint.adapters import describe_base, merged, write_adapters
from afd_scale.checkpoint.formats.lora import LINEARS
from afd_scale.checkpoint.load_student import read_lora, read_student
from afd_scale.checkpoint.weights import save_weights
from afd_scale.config.models import LoraConfig, PolicyConfig
from afd_scale.models.wan import CausalWan
from afd_scale.torchvision_ops import define_torchvision_ops
from tests.networks import make_policy
from tests.tools import load_tool

TOLERANCE = 1e-4
RANK, ALPHA = 3, 5.0
FIELDS = {"family": "self-forcing", "prediction": "velocity", "dim": 48, "ffn_dim": 80, "num_heads": 2, "num_layers": 2,
          "freq_dim": 32, "text_dim": 24, "text_length": 10, "latent_channels": 4}  # fmt: skip


@pytest.fixture(scope="module")
def convert() -> Callable[..., int]:
    main = load_tool("convert_checkpoint").main
    return lambda *arguments: main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def diffusers() -> ModuleType:
    define_torchvision_ops()
    return importlib.import_module("diffusers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, convert: Callable[..., int]) -> Path:
    """`base/`, `student/` of a LoRA run over it, `transformer/`, the base in diffusers, and `whole/`, merged here."""
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(3)
    model = make_policy(FIELDS)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.5 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    policy = PolicyConfig(student=model.config, sampler=model.sampler)
    save_weights(model.state_dict().items(), folder / "base", policy)
    base = describe_base(folder / "base", read_student(folder / "base").state, torch.float32)
    lora = LoraConfig(rank=RANK, alpha=ALPHA)
    adapted = policy.model_copy(update={"student": model.config.model_copy(update={"lora": lora})})
    adapters = random_adapters(model)
    write_adapters(adapters, folder / "student", adapted, base)
    whole = dict(model.state_dict())
    for module in (name.removesuffix(".up") for name in adapters if name.endswith(".up")):
        whole[f"{module}.weight"] = whole[f"{module}.weight"] + ALPHA / RANK * (
            adapters[f"{module}.up"] @ adapters[f"{module}.down"]
        )
    save_weights(whole.items(), folder / "whole", policy)
    assert convert(folder / "base", folder / "transformer", "--to", "diffusers") == 0
    return folder


def random_adapters(model: CausalWan) -> dict[str, Tensor]:
    adapters = {}
    for module in (f"blocks.{layer}.{linear}" for layer in range(2) for linear in LINEARS):
        outputs, inputs = model.get_submodule(module).weight.shape
        adapters |= {
            f"{module}.down": torch.randn(RANK, inputs) * 0.1,
            f"{module}.up": torch.randn(outputs, RANK) * 0.1,
        }
    return adapters


@torch.no_grad()
def velocity(state: Any) -> Tensor:
    """(B, F, C, H, W), of one random input."""
    model = make_policy(FIELDS).eval()
    model.load_state_dict(dict(state))
    noisy, text = inputs()
    result: Tensor = model(noisy, torch.full((2, 3), 625.0), text)
    return result


@torch.no_grad()
def their_velocity(transformer: Any) -> Tensor:
    noisy, text = inputs()
    output: Tensor = transformer.eval()(noisy.transpose(1, 2), torch.full((2,), 625.0), text, return_dict=False)[0]
    return output.transpose(1, 2)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    text = torch.randn(2, 10, 24, generator=generator)
    return torch.randn(2, 3, 4, 6, 8, generator=generator), text


def base_transformer(diffusers: ModuleType, folder: Path) -> Any:
    return diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer")


def assert_alike(ours: Tensor, theirs: Tensor, base: Tensor) -> None:
    assert (ours - base).abs().max() > 0.05, "adapters that change nothing compare nothing"
    assert (ours - theirs).abs().max() < TOLERANCE


def with_peft(diffusers: ModuleType, folder: Path, lora: Path) -> Any:
    return importlib.import_module("peft").PeftModel.from_pretrained(base_transformer(diffusers, folder), lora)


def with_diffusers(diffusers: ModuleType, folder: Path, lora: Path) -> Any:
    """As `pipe.load_lora_weights` does it, of which the transformer is all that a LoRA changes."""
    transformer, pipeline = base_transformer(diffusers, folder), diffusers.WanPipeline
    name = "pytorch_lora_weights.safetensors" if lora.is_dir() else None
    state, metadata = pipeline.lora_state_dict(lora, weight_name=name, return_lora_metadata=True)
    pipeline.load_lora_into_transformer(state, transformer, metadata=metadata)
    return transformer


@pytest.mark.parametrize(
    ("to", "name", "load"),
    [
        ("peft", "lora", with_peft),
        ("peft", "lora", with_diffusers),
        ("comfyui-lora", "lora.safetensors", with_diffusers),
    ],
)
def test_others_load_exported_adapters(
    to: str, name: str, load: Callable[..., Any], folder: Path, tmp_path: Path, diffusers: ModuleType,
    convert: Callable[..., int],
) -> None:  # fmt: skip
    assert convert(folder / "student", tmp_path / name, "--to", to) == 0
    ours, base = velocity(read_student(folder / "whole").state), velocity(read_student(folder / "base").state)
    assert_alike(ours, their_velocity(load(diffusers, folder, tmp_path / name)), base)


def test_a_checkpoints_own_folder_is_pefts(folder: Path, diffusers: ModuleType) -> None:
    ours, base = velocity(read_student(folder / "whole").state), velocity(read_student(folder / "base").state)
    assert_alike(ours, their_velocity(with_peft(diffusers, folder, folder / "student")), base)


def test_adapters_are_merged_when_they_are_read(folder: Path) -> None:
    whole, read = read_student(folder / "whole"), read_student(folder / "student")
    assert read.config() == whole.config()
    assert whole.state.keys() == read.state.keys()
    assert all(torch.allclose(whole.state[name], read.state[name], atol=1e-6) for name in whole.state)


def test_an_exported_student_has_its_adapters_merged(
    folder: Path, tmp_path: Path, diffusers: ModuleType, convert: Callable[..., int]
) -> None:
    assert convert(folder / "student", tmp_path / "out", "--to", "diffusers") == 0
    theirs = their_velocity(diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "out"))
    ours, base = velocity(read_student(folder / "whole").state), velocity(read_student(folder / "base").state)
    assert_alike(ours, theirs, base)


@pytest.mark.parametrize("saved_by", ["peft", "peft with rslora", "diffusers", "diffusers pipeline"])
def test_what_others_save_is_read(saved_by: str, folder: Path, tmp_path: Path, diffusers: ModuleType) -> None:
    """Two ranks and two alphas, so that patterns count."""
    peft = importlib.import_module("peft")
    torch.manual_seed(7)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"],
        rank_pattern={"attn1.to_q": 2}, alpha_pattern={"attn1.to_q": 7, "blocks.1.ffn.net.2": 9},
        use_rslora="rslora" in saved_by, init_lora_weights=False,
    )  # fmt: skip
    transformer, lora = base_transformer(diffusers, folder), tmp_path / "lora"
    if saved_by.startswith("peft"):
        model = peft.get_peft_model(transformer, config)
        model.save_pretrained(lora)
    else:
        transformer.add_adapter(config)
        model = transformer
        if saved_by == "diffusers":
            transformer.save_lora_adapter(lora)
        else:
            diffusers.WanPipeline.save_lora_weights(
                lora, peft.get_peft_model_state_dict(transformer, adapter_name="default"),
                transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
            )  # fmt: skip
    base = read_student(folder / "base").state
    ours = velocity(merged(base, read_lora(lora)))
    assert_alike(ours, their_velocity(model), velocity(base))
