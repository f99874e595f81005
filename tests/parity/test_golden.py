"""The causal Wan student against reference outputs of the Self-Forcing implementation.

`pytest tests/parity/test_golden.py --golden-dir DIR` checks any folder of files like those of tests/golden.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from afd_scale.layers.ops import ModelOps
from afd_scale.models.wan import CausalWan
from afd_scale.rollout.sampler import Noise, Sampler
from tests.networks import make_policy

TOLERANCE = 2e-4

forms = pytest.mark.parametrize("form", ["plain", "fused", "compiled"])


@dataclass
class Golden:
    model: CausalWan
    io: dict[str, Tensor]

    def reference(self, output: str) -> Tensor:
        if output not in self.io:
            pytest.skip(f"the file holds no {output}")
        return self.io[output]


def load_golden(path: Path, form: str) -> Golden:
    """`plain`; `fused`, as a twin that samples; `compiled`."""
    compile = partial(torch.compile, backend="aot_eager", dynamic=False) if form == "compiled" else None
    with safe_open(path, framework="pt") as file:
        shape = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    model = make_policy(
        {
            "dim": shape["dim"], "ffn_dim": shape["ffn_dim"], "freq_dim": shape["freq_dim"],
            "text_dim": shape["text_dim"], "text_length": shape["text_len"], "latent_channels": shape["in_dim"],
            "num_heads": shape["num_heads"], "num_layers": shape["num_layers"], "eps": shape["eps"],
            "prediction": "velocity", "chunk_frames": shape["chunk_frames"], "sink_frames": shape["sink_frames"],
            "window_frames": None if shape["window_frames"] < 0 else shape["window_frames"],
            "timesteps": [1000, 750, 500, 250], "timestep_shift": shape["timestep_shift"],
        },
        ModelOps(compile=compile),
    )  # fmt: skip
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    if form == "fused":
        model.fuse()
    return Golden(model, {k.removeprefix("io."): v for k, v in tensors.items() if k.startswith("io.")})


def assert_close(ours: Tensor, reference: Tensor) -> None:
    assert ours.shape == reference.shape
    assert (ours - reference).abs().max().item() < TOLERANCE


@forms
def test_block_causal_pass(golden_file: Path, form: str) -> None:
    golden = load_golden(golden_file, form)
    io, reference = golden.io, golden.reference("velocity_block_causal")
    with torch.no_grad():
        velocity = golden.model(io["noisy"].transpose(1, 2), io["timestep"], io["text"])
    assert_close(velocity.transpose(1, 2), reference)


@forms
def test_teacher_forcing_pass(golden_file: Path, form: str) -> None:
    golden = load_golden(golden_file, form)
    io, reference = golden.io, golden.reference("velocity_teacher_forcing")
    with torch.no_grad():
        velocity = golden.model(
            io["noisy"].transpose(1, 2), io["timestep"], io["text"], clean=io["clean"].transpose(1, 2)
        )
    assert_close(velocity.transpose(1, 2), reference)


@forms
def test_cached_rollout(golden_file: Path, form: str) -> None:
    golden = load_golden(golden_file, form)
    io, sampler = golden.io, Sampler(golden.model.sampler)
    assert (sampler.sigmas * 1000 - io["rollout_timesteps"]).abs().max().item() < 1e-3
    latents = sampler.rollout(golden.model, io["text"], Noise(io["rollout_noise"], io["rollout_renoise"]))
    assert_close(latents, io["rollout_latents"])


@pytest.fixture
def golden_file(request: pytest.FixtureRequest) -> Path:
    return request.param
