"""An exported student computes the same in diffusers' own WanTransformer3DModel, and comes back bit for bit."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from afd_scale.checkpoint.formats.diffusers import diffusers_config, diffusers_key
from afd_scale.checkpoint.load_student import load_student_state, read_student
from afd_scale.checkpoint.weights import save_weights
from afd_scale.config.models import PolicyConfig, StudentConfig, WanConfig
from afd_scale.models.wan import CausalWan
from afd_scale.torchvision_ops import define_torchvision_ops
from tests.networks import make_policy
from tests.tools import load_tool

TOLERANCE = 1e-4
TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
SIZES = {
    "even": {"dim": 48, "ffn_dim": 80, "num_heads": 2, "num_layers": 2, "freq_dim": 32, "text_dim": 24,
             "text_length": 10, "latent_channels": 4},
    # Three heads of width 22: the rotary split is 8, 7, 7 halved pairs; an odd number of rows and frames.
    "odd": {"dim": 66, "ffn_dim": 70, "num_heads": 3, "num_layers": 3, "freq_dim": 18, "text_dim": 7,
            "text_length": 5, "latent_channels": 3, "eps": 1e-2},
}  # fmt: skip


def student(sizes: str, **fields: Any) -> CausalWan:
    """A student with every parameter random, so that none may be lost or exchanged unseen."""
    config = {"family": "self-forcing", "prediction": "velocity", **SIZES[sizes], **fields}
    torch.manual_seed(3)
    model = make_policy(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5))
    return model.eval()


def policy_config(model: CausalWan) -> PolicyConfig:
    return PolicyConfig(student=model.config, sampler=model.sampler)


def inputs(config: WanConfig, frames: int = 3) -> tuple[Tensor, Tensor]:
    """(B, F, C, H, W) noisy latents, one chunk with H other than W, and text padded to its full length."""
    noisy = torch.randn(2, frames, config.latent_channels, 6, 8)
    text = torch.randn(2, config.text_length, config.text_dim)
    text[:, -2:] = 0
    return noisy, text


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("convert_checkpoint")


@pytest.fixture(scope="module")
def wan_transformer() -> Any:
    define_torchvision_ops()  # diffusers imports transformers' image processors, and they torchvision
    return importlib.import_module("diffusers").WanTransformer3DModel


def export(model: CausalWan, folder: Path, tool: ModuleType, *options: str) -> Path:
    save_weights(model.state_dict().items(), folder / "student", policy_config(model))
    assert tool.main([str(folder / "student"), str(folder / "exported"), "--to", "diffusers", *options]) == 0
    return folder / "exported"


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference of (B, F, C, H, W) and (B, C, F, H, W)."""
    assert ours.std() > 0.1
    return (ours - theirs.transpose(1, 2)).abs().max().item()


@pytest.mark.parametrize("sizes", SIZES)
@torch.no_grad()
def test_the_same_velocity(sizes: str, tmp_path: Path, tool: ModuleType, wan_transformer: Any) -> None:
    model = student(sizes)
    theirs = wan_transformer.from_pretrained(export(model, tmp_path, tool))
    noisy, text = inputs(model.config)
    for timestep in (1000.0, 833.25, 3.0):
        ours = model(noisy, torch.full((2, 3), timestep), text)
        output = theirs(noisy.transpose(1, 2), torch.full((2,), timestep), text).sample
        assert difference(ours, output) < TOLERANCE


@pytest.mark.parametrize("sizes", SIZES)
@torch.no_grad()
def test_the_same_velocity_with_a_timestep_per_frame(
    sizes: str, tmp_path: Path, tool: ModuleType, wan_transformer: Any
) -> None:
    model = student(sizes)
    theirs = wan_transformer.from_pretrained(export(model, tmp_path, tool))
    noisy, text = inputs(model.config)
    timestep = torch.tensor([[937.5, 625.0, 0.0], [1000.0, 250.0, 833.25]])
    ours = model(noisy, timestep, text)
    output = theirs(noisy.transpose(1, 2), timestep.repeat_interleave(3 * 4, dim=1), text).sample
    assert difference(ours, output) < TOLERANCE


@torch.no_grad()
def test_an_x0_student_outputs_x0_in_diffusers(
    tmp_path: Path, tool: ModuleType, wan_transformer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = student("even", prediction="x0")
    theirs = wan_transformer.from_pretrained(export(model, tmp_path, tool))
    assert "predicts x0" in capsys.readouterr().out
    noisy, text = inputs(model.config)
    x0 = theirs(noisy.transpose(1, 2), torch.full((2,), 625.0), text).sample
    velocity = model(noisy, torch.full((2, 3), 625.0), text)
    assert difference(noisy - 0.625 * velocity, x0) < TOLERANCE


def test_diffusers_reads_our_shards(tmp_path: Path, tool: ModuleType, wan_transformer: Any) -> None:
    model = student("odd")
    exported = export(model, tmp_path, tool, "--max-shard-size", "60KB")
    assert len(list(exported.glob("diffusion_pytorch_model-*.safetensors"))) > 5
    theirs = wan_transformer.from_pretrained(exported).state_dict()
    ours = {diffusers_key(key): tensor for key, tensor in model.state_dict().items()}
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_the_way_back_is_exact(prediction: str, tmp_path: Path, tool: ModuleType) -> None:
    model = student("odd", prediction=prediction, chunk_frames=2, window_frames=6, sink_frames=2, timestep_shift=7.0)
    exported = export(model, tmp_path, tool)
    assert tool.main([str(exported), str(tmp_path / "back"), "--to", "afd"]) == 0
    assert (tmp_path / "back" / "student.json").read_text() == (tmp_path / "student" / "student.json").read_text()
    source = read_student(tmp_path / "back")
    assert source.config() == policy_config(model)
    state = load_student_state(exported, model.config)
    for key, tensor in model.state_dict().items():
        assert torch.equal(source.state[key], tensor)
        assert torch.equal(state[key], tensor)


@torch.no_grad()
def test_weights_saved_by_diffusers(tmp_path: Path, wan_transformer: Any) -> None:
    """A plain Wan, sharded by diffusers itself: velocity, Wan's text length, Self-Forcing's generation."""
    torch.manual_seed(5)
    theirs = wan_transformer(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=24, freq_dim=32,
        ffn_dim=80, num_layers=2,
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    source = read_student(tmp_path)
    config = source.config()
    assert (config.sampler.family, config.sampler.chunk_frames) == ("self-forcing", 3)
    assert (config.student.text_length, config.student.num_heads) == (512, 2)
    model = CausalWan(config.student, config.sampler)
    model.load_state_dict(source.state)
    noisy, text = inputs(config.student)
    ours = model(noisy, torch.full((2, 3), 625.0), text)
    assert difference(ours, theirs(noisy.transpose(1, 2), torch.full((2,), 625.0), text).sample) < TOLERANCE


def test_the_config_is_diffusers_own(wan_transformer: Any) -> None:
    """Every field that the class registers, none else."""
    config = StudentConfig(architecture="wan-14b")
    with torch.device("meta"):
        own = dict(wan_transformer(**{k: v for k, v in diffusers_config(config).items() if k[0] != "_"}).config)
        defaults = dict(wan_transformer().config)  # the class's defaults are the 14B's
    written = diffusers_config(config)
    assert written.pop("_class_name") == wan_transformer.__name__
    assert written.pop("_diffusers_version")
    for registered in (own, defaults):
        assert {k: list(v) if isinstance(v, tuple) else v for k, v in registered.items() if k[0] != "_"} == written
