"""The served folder against what FastVideo and SGLang read, as `served_sources.json` records it from their sources."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from afd_scale.checkpoint.formats import models_folder
from afd_scale.checkpoint.formats.served import MAX_CHUNK_FRAMES, STEPS, served_config, served_scheduler
from afd_scale.checkpoint.load_student import read_student
from afd_scale.checkpoint.weights import save_weights
from afd_scale.codecs import wan as codec
from afd_scale.config.models import PolicyConfig
from afd_scale.flow.schedule import denoising_sigmas
from afd_scale.models.wan import CausalWan
from tests.tools import Done, call_tool
from tests.wan_models import CHANNELS, TEXT_DIM, save_tiny_wan

SOURCES: dict[str, Any] = json.loads(Path(__file__).with_name("served_sources.json").read_text())
STUDENT = {"dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "text_dim": TEXT_DIM,
           "text_length": 512, "latent_channels": CHANNELS, "prediction": "velocity"}  # fmt: skip


def policy(student: dict[str, Any] | None = None, **sampler: Any) -> PolicyConfig:
    return PolicyConfig.model_validate({
        "student": {**STUDENT, **(student or {})}, "sampler": {"family": "self-forcing", **sampler}
    })  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_wan(folder)
    return folder


def export(folder: Path, models: Path, config: PolicyConfig) -> Done:
    torch.manual_seed(0)
    state = CausalWan(config.student, config.sampler).state_dict()
    save_weights(((name, torch.randn(weight.shape)) for name, weight in state.items()), folder / "student", config)
    return call_tool("convert_checkpoint", folder / "student", folder / "out", "--to", "served", "--models", models)


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def test_the_folder_is_what_they_read(models: Path, tmp_path: Path) -> None:
    config = policy(chunk_frames=1, window_frames=6, sink_frames=2)
    done = export(tmp_path, models, config)
    assert done.returncode == 0, done.stderr
    index = read(tmp_path / "out" / "model_index.json")
    assert index.pop("_class_name") == SOURCES["pipeline_class"]
    assert index.pop("_diffusers_version")
    assert index == SOURCES["modules"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*index, "model_index.json", "README.md"}
    transformer = tmp_path / "out" / "transformer"
    assert read(transformer / "config.json") == served_config(config)
    assert read(tmp_path / "out" / "scheduler" / "scheduler_config.json") == served_scheduler(config)
    for part in ("vae", "text_encoder", "tokenizer"):
        for path in (models / part).iterdir():
            assert (tmp_path / "out" / part / path.name).read_bytes() == path.read_bytes()

    theirs = {*SOURCES["keys"], *(f"blocks.{layer}.{key}" for layer in range(2) for key in SOURCES["block_keys"])}
    assert set(load_file(transformer / "diffusion_pytorch_model.safetensors")) == theirs
    source, back = read_student(tmp_path / "student"), read_student(tmp_path / "out")
    assert back.config() == config
    assert all(torch.equal(back.state[key], tensor) for key, tensor in source.state.items())


def test_the_config_is_theirs() -> None:
    """Every field that they read, the 14B's with their defaults, and none else."""
    large = PolicyConfig.model_validate({"student": {"architecture": "wan-14b"}, "sampler": {"family": "self-forcing"}})
    written = served_config(large)
    assert written.pop("_class_name") == SOURCES["modules"]["transformer"][1]
    assert written.pop("_diffusers_version")
    assert written == SOURCES["transformer_config_defaults"]
    assert large.student.text_length == SOURCES["text_length"]
    windowed = served_config(policy(chunk_frames=3, window_frames=12, sink_frames=3))
    assert (windowed["local_attn_size"], windowed["sink_size"], windowed["sliding_window_num_frames"]) == (12, 3, 12)


def looked_up(config: dict[str, Any], steps: list[int]) -> Tensor:
    """The noise levels that the servers take for these steps: row 1000 - t of the scheduler's own table."""
    fields = {**SOURCES["scheduler_defaults"], **config}
    count = fields["num_inference_steps"]
    table = torch.linspace(fields["sigma_max"], fields["sigma_min"], count + fields["extra_one_step"])[:count]
    table = fields["shift"] * table / (1 + (fields["shift"] - 1) * table)
    return table[[1000 - step for step in steps]]


@pytest.mark.parametrize("shift", [5.0, 3.0])
def test_their_scheduler_gives_our_noise_levels(shift: float) -> None:
    written = served_scheduler(policy(timestep_shift=shift))
    assert written.pop("_class_name") == SOURCES["modules"]["scheduler"][1]
    assert written.pop("_diffusers_version")
    assert written.keys() == SOURCES["scheduler_defaults"].keys()
    steps = SOURCES["denoising_steps"]
    torch.testing.assert_close(looked_up(written, steps), denoising_sigmas(steps, shift), atol=1e-6, rtol=0)


def test_the_family_is_their_default() -> None:
    config = policy()
    assert list(config.sampler.timesteps) == list(STEPS) == SOURCES["denoising_steps"]
    assert config.sampler.timestep_shift == SOURCES["flow_shift"]
    assert SOURCES["largest_num_frames_per_block"] == MAX_CHUNK_FRAMES


def test_other_steps_are_said(models: Path, tmp_path: Path) -> None:
    note = "note: FastVideo and SGLang take the steps 1000, 750, 500, 250 unless told otherwise"
    for name, steps in (("theirs", (1000, 750, 500, 250)), ("other", (1000, 500))):
        (tmp_path / name).mkdir()
        done = export(tmp_path / name, models, policy(timesteps=steps))
        assert (note in done.stdout) == (name == "other")


@pytest.mark.parametrize(
    ("student", "sampler", "rule"),
    [
        ({"prediction": "x0"}, {}, "prediction (x0) must be velocity"),
        ({"text_length": 256}, {}, "text_length (256) must be 512"),
        ({}, {"chunk_frames": 4}, "chunk_frames (4) must be 3 or less"),
        ({}, {"first_chunk_frames": 1}, "first_chunk_frames (1) must be None"),
        ({}, {"window_frames": 9, "positions": "window"}, "positions (window) must be absolute"),
        ({}, {"first_chunk_timesteps": (1000, 500)}, "first_chunk_timesteps ((1000, 500)) must be None"),
        ({"text_dim": 8}, {}, "must have d_model 8 in text_encoder/, as the student needs: it has 32"),
        ({"latent_channels": 5}, {}, "must have z_dim 5 in vae/, as the student needs: it has 4"),
    ],
)
def test_what_they_cannot_serve_is_refused(
    student: dict[str, Any], sampler: dict[str, Any], rule: str, models: Path, tmp_path: Path
) -> None:
    done = export(tmp_path, models, policy(student, **sampler))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert rule in line
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_what_is_copied_is_what_the_codec_reads() -> None:
    """Neither package may import the other."""
    assert models_folder._NEEDED == codec._FILES
