"""The parity matrix: data x sequence ranks under ZeRO-3 against the same networks in plain torch, one process, float32.

For each mesh, with and without activation checkpointing, window and LoRA: outputs, gradients, three steps of AFD. The
sharded ones are built by the code that builds a run; the plain ones start from their weights, and what they compute is
recorded once and compared with every mesh. 9 tokens a frame do not divide among 2 ranks, so padding takes part.

Run as a script by torchrun this file is one rank; as a test it starts them.
"""

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.distributed.processes import leave, on_ranks

TOLERANCE = 1e-3 if torch.cuda.is_available() else 1e-4  # a GPU adds in any order
STEPS, PROMPTS, FRAMES, SIZE = 3, 2, 3, 6
SHAPE = {"dim": 32, "ffn_dim": 40, "num_heads": 2, "num_layers": 2, "freq_dim": 8, "text_dim": 6, "text_length": 5,
         "latent_channels": 3, "prediction": "velocity"}  # fmt: skip
OPTIMIZER = {"learning_rate": 0.01, "epsilon": 1e-3, "weight_decay": 0.1, "gradient_norm": 0.5}
LORA = {"rank": 3, "alpha": 6.0}
OF_ROWS = "of rows: "  # a result with a row a video, of which a rank has its share

Results = dict[str, Tensor]


def run_config(folder: Path, sequence: int, checkpointing: bool, window: bool, lora: bool) -> Any:
    from afd_scale.config import RunConfig

    shared = {**SHAPE, "activation_checkpointing": checkpointing, "lora": LORA if lora else None}
    windowed = {"window_frames": 2, "sink_frames": 1} if window else {}
    return RunConfig.model_validate({
        "student": {**shared, "weights": folder / "student"},
        "sampler": {**windowed, "timesteps": [1000]},
        "data": {"latent_frames": FRAMES, "latent_height": SIZE, "latent_width": SIZE, "global_batch": PROMPTS},
        "evaluation": {"metrics": "none"},
        "parallel": {"sequence": sequence},
        "rollout": {"weights": "gathered" if window else "sharded"},
        "train": {"micro_batch": 1 if checkpointing and window else None},
        "method": {
            "name": "afd", "optimizer": OPTIMIZER, "discriminator_optimizer": OPTIMIZER, "rollouts_per_prompt": 2,
            "prior_weight": 0.1, "old_policy_decay": 0.8, "states_per_rollout": 2, "r1_weight": 0.1,
            "context_gradient": checkpointing != window, "sigma": {"name": "uniform"},
            "discriminator": {"name": "latent", **shared, "num_layers": 1},
        },
    })  # fmt: skip


def check_matrix(folder: Path, sequence: int) -> None:
    """Every rank: each cell of the matrix for this mesh; one rank alone records the plain results first."""
    from afd_scale.parallel.launchers import launched_as
    from afd_scale.parallel.ranks import start_ranks
    from afd_scale.training.build import build_run

    with start_ranks(launched_as(os.environ), timeout_minutes=2) as processes:
        ranks = processes.sharing_videos(sequence, timeout_minutes=2)
        if ranks.size == 1:
            save_start(folder)
        for checkpointing, window, lora in itertools.product((False, True), repeat=3):
            config = run_config(folder, sequence, checkpointing, window, lora)
            sharded = build_run(config, ranks).method
            for trained in (sharded.student, sharded.discriminator):
                randomise_adapters(trained)
            if lora:
                sharded.old_policy.follow(sharded.student, 0.0)
            recorded = folder / f"{checkpointing}-{window}-{lora}.safetensors"
            if ranks.size == 1:
                plain = results_of(plain_method(sharded, config), slice(0, PROMPTS), lambda x: x)
                save_file({name: value.contiguous() for name, value in plain.items()}, recorded)
            share = PROMPTS // ranks.data_size
            rows = slice(ranks.data_rank * share, (ranks.data_rank + 1) * share)
            cell = f"{ranks.data_size}x{sequence}, checkpointing {checkpointing}, window {window}, lora {lora}"
            compare(results_of(sharded, rows, ranks.mean), load_file(recorded), rows, cell)


def compare(ours: Results, expected: Results, rows: slice, cell: str) -> None:
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        reference = expected[name][rows] if name.startswith(OF_ROWS) else expected[name]
        assert value.shape == reference.shape, f"{cell}: {name}"
        scale = reference.abs().max().clamp(min=1e-3) if name.startswith("gradient") else 1.0
        assert reference.abs().max() > 0 or not name.startswith("gradient"), f"{cell}: {name} is all zero"
        difference = ((value.cpu() - reference) / scale).abs().max().item()
        assert difference < TOLERANCE, f"{cell}: {name} differs by {difference}"


def results_of(method: Any, rows: slice, mean: Any) -> Results:
    """All that is compared, of sharded or plain engines, on some rows of the global batch."""
    found: Results = {}
    batch = make_batch(9, rows)
    found |= outputs_and_gradients(method, batch, rows)
    for step in range(1, STEPS + 1):
        metrics = method.train_step(make_batch(step, rows), step)
        for name in sorted(metrics.keys() - {"discriminator/accuracy"}):  # a count may tip over
            found[f"{name} of step {step}"] = mean(metrics[name])
    for policy in ("student", "old_policy", "discriminator"):
        for name, weight in whole_weights(getattr(method, policy)):
            found[f"{policy}: {name} at the end"] = weight
    return {name: value.detach().float().cpu() for name, value in found.items()}


def outputs_and_gradients(method: Any, batch: Any, rows: slice) -> Results:
    from afd_scale.config.sampler import SamplerConfig
    from afd_scale.rollout.sampler import Noise, Sampler

    found: Results = {}
    sampler = Sampler(SamplerConfig(timesteps=(1000, 500), timestep_shift=1.0))
    videos, text = batch.teacher, batch.prompts.embeddings
    noise = draw(PROMPTS, *videos.latents.shape[1:], seed=5)[rows]
    timestep = 1000 * draw(PROMPTS, FRAMES, seed=6)[rows].sigmoid()
    for name in ("old_policy", "reference"):
        policy = getattr(method, name)
        with policy.resident():
            found[f"{OF_ROWS}rollout of {name}"] = sampler.rollout(policy, text, Noise(noise, noise[None]))
    for pass_, options in (
        ("block-causal", {}), ("joint", {"clean": videos.latents}),
        ("clean past", {"clean": videos.latents, "clean_gradient": False}),
    ):  # fmt: skip
        velocity = method.student(noise, timestep, text, **options)
        found[f"{OF_ROWS}{pass_} velocity"] = velocity
        method.student.backward(velocity.square().mean())
        found |= {f"gradient of {name}, {pass_}": g for name, g in taken_gradients(method.student)}
    logits = method.discriminator(videos.of(noise))
    found[f"{OF_ROWS}logits"] = logits
    method.discriminator.backward(logits.sin().mean())
    return found | {f"gradient of {name}, discriminator": g for name, g in taken_gradients(method.discriminator)}


def taken_gradients(trained: Any) -> Iterator[tuple[str, Tensor]]:
    """Of every trained weight, which are then forgotten."""
    from deepspeed.utils import safe_get_full_grad

    for name, parameter in trained.network.named_parameters():
        if parameter.requires_grad:
            gradient = safe_get_full_grad(parameter) if hasattr(trained, "engine") else parameter.grad
            yield name, gradient.clone()
    if hasattr(trained, "engine"):
        trained.engine.optimizer.zero_grad()
        trained.engine.optimizer.clear_backward_seen_flag()
        trained.engine.optimizer.micro_step_id = 0
    else:
        trained.optimizer.zero_grad()


def whole_weights(network: Any) -> Any:
    from afd_scale.engines.shards import merged_weights

    if hasattr(network, "engine"):
        return network.full_weights()
    return merged_weights(network.network, network.adapter, lambda name, p: p.detach().clone())


def plain_method(sharded: Any, config: Any) -> Any:
    """The same method on plain copies of the networks."""
    from afd_scale.engines.cast import build_cast
    from afd_scale.engines.plain import Plain
    from afd_scale.engines.shards import whole_weight
    from afd_scale.methods import make_method

    engines = build_cast(config, Plain(config, device()))
    for role, engine in engines.items():
        for name, parameter in getattr(sharded, role).network.named_parameters():
            engine.network.get_parameter(name).data.copy_(whole_weight(parameter))
    return make_method(config, engines, lambda x: x)


def save_start(folder: Path) -> None:
    from afd_scale.checkpoint.weights import save_weights
    from afd_scale.config.models import PolicyConfig
    from afd_scale.models.wan import CausalWan

    policy = PolicyConfig.model_validate({"student": SHAPE})
    network = CausalWan(policy.student, policy.sampler)
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    save_weights(network.state_dict().items(), folder / "student", policy)


def randomise_adapters(trained: Any) -> None:
    """New adapters change nothing and have zero gradients, and the score is random already."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param

    from afd_scale.layers.lora import adapter_of

    generator = torch.Generator().manual_seed(4)
    for name, parameter in trained.network.named_parameters():
        if parameter.requires_grad and adapter_of(name):
            weight = 0.2 * torch.randn(tuple(parameter.ds_shape), generator=generator).to(device())
            safe_set_full_fp32_param(parameter, weight)  # the optimizer's
            with GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(weight)


def make_batch(step: int, rows: slice) -> Any:
    from tests.networks import make_batch

    latents = draw(PROMPTS, FRAMES, SHAPE["latent_channels"], SIZE, SIZE, seed=10 + step)
    samples = tuple(range(PROMPTS * step, PROMPTS * (step + 1)))
    return make_batch(latents[rows], draw(PROMPTS, 5, SHAPE["text_dim"], seed=20 + step)[rows], samples[rows])


def draw(*shape: Any, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device())


def device() -> torch.device:
    """Where `start_ranks` computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def run_mesh(folder: Path, data: int, sequence: int) -> None:
    result = on_ranks(data * sequence, __file__, folder, str(sequence), timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What plain torch computes; the mesh of one rank, which records it, is held to it at once."""
    folder = tmp_path_factory.mktemp("parity")
    run_mesh(folder, 1, 1)
    return folder


@pytest.mark.timeout(600)  # four ranks on two slow cores
@pytest.mark.parametrize(("data", "sequence"), [(1, 2), (2, 1), (2, 2)])
def test_every_mesh_equals_one_process(data: int, sequence: int, recorded: Path) -> None:
    run_mesh(recorded, data, sequence)


def test_one_rank_equals_one_process(recorded: Path) -> None:
    assert len(list(recorded.glob("*.safetensors"))) == 8


if __name__ == "__main__":
    check_matrix(Path(sys.argv[1]), int(sys.argv[2]))
    leave()
