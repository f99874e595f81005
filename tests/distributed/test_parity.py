"""The parity matrix: data x sequence ranks under ZeRO-3 against the same networks in plain torch, one process, float32.

For each mesh, with and without activation checkpointing, window and LoRA: outputs, gradients, three steps of AFD. With
a window weights are gathered, and a plain twin runs; with both others attention is kept, once with compiled blocks. The
sharded ones are built by the code that builds a run; the plain ones start from their weights, and what they compute is
recorded once and compared with every mesh. Four ranks run half of the cells, that with all three among them, in which
any two meet in all ways. 9 tokens a frame do not divide among 2 ranks, so padding takes part.

Run as a script by torchrun this file is one rank; as a test it starts them.
"""

import itertools
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.meshes import (
    OF_ROWS,
    Results,
    check_cells,
    draw,
    randomise_adapters,
    run_mesh,
    steps_of,
    taken_gradients,
    weights_of,
)
from tests.distributed.processes import leave

STEPS, PROMPTS, FRAMES, SIZE = 3, 2, 3, 6
SHAPE = {"dim": 32, "ffn_dim": 40, "num_heads": 2, "num_layers": 2, "freq_dim": 8, "text_dim": 6, "text_length": 5,
         "latent_channels": 3, "prediction": "velocity"}  # fmt: skip
OPTIMIZER = {"learning_rate": 0.01, "epsilon": 1e-3, "weight_decay": 0.1, "gradient_norm": 0.5}
LORA = {"rank": 3, "alpha": 6.0}


def run_config(folder: Path, sequence: int, checkpointing: bool, window: bool, lora: bool) -> Any:
    from afd_scale.config import RunConfig

    recompute = ("keep_attention" if lora else "full") if checkpointing else "none"
    shared = {**SHAPE, "activation_checkpointing": recompute, "lora": LORA if lora else None}
    windowed = {"window_frames": 2, "sink_frames": 1} if window else {}
    return RunConfig.model_validate({
        "student": {**shared, "weights": folder / "student"},
        "sampler": {**windowed, "timesteps": [1000]},
        "data": {"latent_frames": FRAMES, "latent_height": SIZE, "latent_width": SIZE, "global_batch": PROMPTS},
        "evaluation": {"metrics": "none"},
        "parallel": {"sequence": sequence},
        "rollout": {"weights": "gathered" if window else "sharded"},
        # Of one cell on one mesh, for it takes a while: ranks that share a video, recomputation and adapters.
        "compile": checkpointing and lora and not window and sequence == int(os.environ["WORLD_SIZE"]) == 2,
        # What is generated for many ranks, which there are not here.
        "engine": {"parameter_persistence": 50, "deepspeed": {"zero_optimization": {
            "stage3_allgather_sequential": True}}} if checkpointing else {},
        "train": {"micro_batch": 1 if checkpointing and window else None},
        "method": {
            "name": "afd", "optimizer": OPTIMIZER, "discriminator_optimizer": OPTIMIZER, "rollouts_per_prompt": 2,
            "prior_weight": 0.1, "old_policy_decay": 0.8, "states_per_rollout": 2, "r1_weight": 0.1,
            "context_gradient": checkpointing != window, "sigma": {"name": "uniform"},
            "discriminator": {"name": "latent", **shared, "num_layers": 1},
        },
    })  # fmt: skip


def results_of(method: Any, engines: Any, rows: slice, mean: Any) -> Results:
    found = outputs_and_gradients(engines, make_batch(9, rows), rows)
    found |= steps_of(method, {step: make_batch(step, rows) for step in range(1, STEPS + 1)}, mean)
    return found | weights_of({role: engines[role] for role in ("student", "old_policy", "discriminator")})


def outputs_and_gradients(engines: Any, batch: Any, rows: slice) -> Results:
    from afd_scale.config.sampler import SamplerConfig
    from afd_scale.rollout.sampler import Noise, Sampler

    found: Results = {}
    sampler = Sampler(SamplerConfig(timesteps=(1000, 500), timestep_shift=1.0))
    videos, text = batch.teacher, batch.prompts.embeddings
    noise = draw(PROMPTS, *videos.latents.shape[1:], seed=5)[rows]
    timestep = 1000 * draw(PROMPTS, FRAMES, seed=6)[rows].sigmoid()
    for name in ("old_policy", "reference"):
        policy = engines[name]
        with policy.resident():
            found[f"{OF_ROWS}rollout of {name}"] = sampler.rollout(policy, text, Noise(noise, noise[None]))
    for pass_, options in (
        ("block-causal", {}), ("joint", {"clean": videos.latents}),
        ("clean past", {"clean": videos.latents, "clean_gradient": False}),
    ):  # fmt: skip
        velocity = engines["student"](noise, timestep, text, **options)
        found[f"{OF_ROWS}{pass_} velocity"] = velocity
        engines["student"].backward(velocity.square().mean())
        found |= {f"gradient of {name}, {pass_}": g for name, g in taken_gradients(engines["student"])}
    judge = engines["discriminator"]
    logits = judge(videos.of(noise))
    found[f"{OF_ROWS}logits"] = logits
    judge.backward(logits.sin().mean())
    return found | {f"gradient of {name}, discriminator": g for name, g in taken_gradients(judge)}


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


def make_batch(step: int, rows: slice) -> Any:
    from tests.networks import make_batch

    latents = draw(PROMPTS, FRAMES, SHAPE["latent_channels"], SIZE, SIZE, seed=10 + step)
    samples = tuple(range(PROMPTS * step, PROMPTS * (step + 1)))
    return make_batch(latents[rows], draw(PROMPTS, 5, SHAPE["text_dim"], seed=20 + step)[rows], samples[rows])


def check_matrix(folder: Path, sequence: int) -> None:
    from afd_scale.layers import choose_compile

    choose_compile.BACKEND = "aot_eager"  # traces and splits as any other, and needs no compiler
    if not (folder / "student").exists():
        save_start(folder)

    def ready(engines: Any) -> None:
        for role in ("student", "discriminator"):
            randomise_adapters(engines[role])
        engines["old_policy"].follow(engines["student"], 0.0)

    cells = {
        f"checkpointing {checkpointing}, window {window}, lora {lora}": partial(
            run_config, folder, sequence, checkpointing, window, lora
        )
        for checkpointing, window, lora in itertools.product((False, True), repeat=3)
        if int(os.environ["WORLD_SIZE"]) < 4 or (checkpointing + window + lora) % 2 == 1
    }
    check_cells(folder, sequence, cells, results_of, ready)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What plain torch computes; the mesh of one rank, which records it, is held to it at once."""
    folder = tmp_path_factory.mktemp("parity")
    run_mesh(__file__, folder, 1, 1)
    return folder


@pytest.mark.timeout(600)  # four ranks on two slow cores
@pytest.mark.parametrize(("data", "sequence"), [(1, 2), (2, 1), (2, 2)])
def test_every_mesh_equals_one_process(data: int, sequence: int, recorded: Path) -> None:
    run_mesh(__file__, recorded, data, sequence)


def test_one_rank_equals_one_process(recorded: Path) -> None:
    assert len(list(recorded.glob("*.safetensors"))) == 8


if __name__ == "__main__":
    check_matrix(Path(sys.argv[1]), int(sys.argv[2]))
    leave()
