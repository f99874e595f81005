"""The parity matrix: data x sequence ranks under ZeRO-3 against the same networks in plain torch, one process, float32.

For each mesh, with and without activation checkpointing, window and LoRA: outputs, gradients and five steps of AFD, all
built by the code that builds a run. 9 tokens a frame do not divide among 2 ranks, so padding takes part.

Run as a script by torchrun this file is one rank; as a test it starts them.
"""

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.processes import torchrun

TOLERANCE = 1e-3 if torch.cuda.is_available() else 1e-4  # a GPU adds in any order
STEPS, PROMPTS, FRAMES, SIZE = 5, 2, 3, 6
SHAPE = {"dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 2, "freq_dim": 8, "text_dim": 6, "text_length": 5,
         "latent_channels": 3, "prediction": "velocity"}  # fmt: skip
OPTIMIZER = {"learning_rate": 0.01, "epsilon": 1e-3, "weight_decay": 0.1, "gradient_norm": 0.5}
LORA = {"rank": 3, "alpha": 6.0}


def run_config(folder: Path, checkpointing: bool, window: bool, lora: bool, **sections: Any) -> Any:
    from afd_scale.config import RunConfig

    shared = {**SHAPE, "activation_checkpointing": checkpointing, "lora": LORA if lora else None}
    windowed = {"window_frames": 2, "sink_frames": 1} if window else {}
    return RunConfig.model_validate({
        "student": {**shared, **windowed, "timesteps": [1000, 500], "weights": folder / "student"},
        "data": {"latent_frames": FRAMES, "latent_height": SIZE, "latent_width": SIZE, "global_batch": PROMPTS},
        "evaluation": {"metrics": "none"},
        "method": {
            "name": "afd", "optimizer": OPTIMIZER, "discriminator_optimizer": OPTIMIZER, "rollouts_per_prompt": 2,
            "prior_weight": 0.1, "old_policy_decay": 0.8, "states_per_rollout": 2, "r1_weight": 0.1,
            "context_gradient": checkpointing, "discriminator": {"name": "latent", **shared},
        },
        **sections,
    })  # fmt: skip


def check_matrix(folder: Path, sequence: int) -> None:
    """Every rank: each cell of the matrix for this mesh."""
    from afd_scale.parallel.launchers import launched_as
    from afd_scale.parallel.ranks import start_ranks

    with start_ranks(launched_as(os.environ), timeout_minutes=2) as processes:
        ranks = processes.sharing_videos(sequence, timeout_minutes=2)
        ranks.run_on_main(save_start, folder)
        for checkpointing, window, lora in itertools.product((False, True), repeat=3):
            weights = "gathered" if window else "sharded"
            micro = 1 if checkpointing else None
            config = run_config(
                folder, checkpointing, window, lora, rollout={"weights": weights}, train={"micro_batch": micro}
            )
            cell = f"{ranks.data_size}x{sequence}, checkpointing {checkpointing}, window {window}, lora {lora}"
            check_cell(config, ranks, cell)


def save_start(folder: Path) -> None:
    from afd_scale.checkpoint.weights import save_weights
    from afd_scale.config.models import StudentConfig
    from afd_scale.models.wan import CausalWan

    config = StudentConfig.model_validate(SHAPE)
    network = CausalWan(config)
    randomise(network.named_parameters())
    save_weights(network.state_dict().items(), folder / "student", config)


def check_cell(config: Any, ranks: Any, cell: str) -> None:
    from afd_scale.benchmarks.engines import PlainAverage, PlainNetwork, PlainTrained
    from afd_scale.flow.randomness import Randomness
    from afd_scale.methods.afd import Afd
    from afd_scale.training.build import build_run

    run = build_run(config, ranks)
    sharded = run.method
    student, discriminator = sharded.student, sharded.discriminator
    for trained in (student, discriminator):
        randomise_adapters(trained)
    if config.student.lora:
        sharded.old_policy.follow(student, 0.0)

    plain_student = PlainTrained(unsharded(student), config.method.optimizer, student.adapter)
    plain_discriminator = PlainTrained(unsharded(discriminator), config.method.discriminator_optimizer)
    if config.student.lora:
        plain_old = PlainAverage(plain_student.network, "old_policy")
        reference = PlainNetwork(plain_student.network)
    else:
        plain_old, reference = PlainAverage(unsharded(student)), PlainNetwork(unsharded(student))
    plain = Afd(
        config.method, config.student, config.train.steps, Randomness(config.seed), plain_student, plain_old, reference,
        plain_discriminator, lambda x: x, config.train.micro_batch,
    )  # fmt: skip

    share = PROMPTS // ranks.data_size
    rows = slice(ranks.data_rank * share, (ranks.data_rank + 1) * share)
    check_outputs_and_gradients(sharded, plain, rows, cell)
    for step in range(1, STEPS + 1):
        batch = make_batch(step)
        ours, expected = sharded.train_step(batch[rows], step), plain.train_step(batch, step)
        assert ours.keys() == expected.keys()
        for name in sorted(ours.keys() - {"discriminator/accuracy"}):  # a count may tip over
            close(ranks.mean(ours[name]), expected[name], f"{cell}: {name} of step {step}")
    check_weights(student, plain_student.network, plain_student.adapter, cell)
    check_weights(sharded.old_policy, plain_old.network, plain_old.adapter, cell)
    check_weights(discriminator, plain_discriminator.network, None, cell)


def check_outputs_and_gradients(sharded: Any, plain: Any, rows: slice, cell: str) -> None:
    from deepspeed.utils import safe_get_full_grad

    from afd_scale.rollout.causal import rollout

    batch, sigmas = make_batch(9), torch.tensor([1.0, 0.5])
    noise, timestep = draw(*batch.latents.shape, seed=5), 1000 * draw(PROMPTS, FRAMES, seed=6).sigmoid()
    arguments = (noise, timestep, batch.text)
    for policy, other in (
        (sharded.student, plain.student), (sharded.old_policy, plain.old_policy), (sharded.reference, plain.reference)
    ):  # fmt: skip
        with policy.resident():
            ours = rollout(policy, batch.text[rows], noise[rows], noise[None, rows], sigmas)
        close(ours, rollout(other, batch.text, noise, noise[None], sigmas)[rows], f"{cell}: rollout")

    for options in ({}, {"clean": batch.latents}, {"clean": batch.latents, "clean_gradient": False}):
        own = {name: value[rows] if isinstance(value, Tensor) else value for name, value in options.items()}
        ours = sharded.student(*(x[rows] for x in arguments), **own)
        expected = plain.student(*arguments, **options)
        close(ours, expected[rows], f"{cell}: velocity with {list(options)}")
        sharded.student.backward(ours.square().mean())
        expected.square().mean().backward()
        same_gradients(sharded.student, plain.student, f"{cell}: student with {list(options)}", safe_get_full_grad)
    ours, expected = sharded.discriminator(noise[rows], batch.text[rows]), plain.discriminator(noise, batch.text)
    close(ours, expected[rows], f"{cell}: logits")
    sharded.discriminator.backward(ours.sin().mean())
    expected.sin().mean().backward()
    same_gradients(sharded.discriminator, plain.discriminator, f"{cell}: discriminator", safe_get_full_grad)


def same_gradients(ours: Any, plain: Any, what: str, gradient_of: Any) -> None:
    """Of every trained weight; then a step of size 0 forgets them."""
    expected = dict(plain.network.named_parameters())
    trained = [(name, p) for name, p in ours.network.named_parameters() if p.requires_grad]
    assert {name for name, _ in trained} == {name for name, p in expected.items() if p.requires_grad}
    for name, parameter in trained:
        gradient, reference = gradient_of(parameter), expected[name].grad
        scale = reference.abs().max().clamp(min=1e-3)
        assert reference.abs().max() > 0, name
        close(gradient / scale, reference / scale, f"{what}: gradient of {name}")
    plain.optimizer.zero_grad()
    ours.engine.optimizer.zero_grad()
    ours.engine.optimizer.clear_backward_seen_flag()
    ours.engine.optimizer.micro_step_id = 0


def check_weights(ours: Any, plain: nn.Module, adapter: str | None, cell: str) -> None:
    from afd_scale.parallel.shards import merged_weights

    expected = dict(merged_weights(plain, adapter, lambda name, p: plain.get_parameter(name).detach()))
    found = dict(ours.full_weights())
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        close(found[name], weight, f"{cell}: {name} after {STEPS} steps")


def unsharded(sharded: Any) -> nn.Module:
    """A plain copy of a sharded network."""
    from afd_scale.layers.lora import Adapters
    from afd_scale.layers.ops import ModelOps
    from afd_scale.parallel.shards import whole_weight

    network = sharded.network
    adapters = network.ops.adapters
    ops = ModelOps(adapters=Adapters(adapters.names, adapters.rank, adapters.scale) if adapters else None)
    copy = type(network)(network.config, ops)
    for name, parameter in network.named_parameters():
        target = copy.get_parameter(name)
        target.data.copy_(whole_weight(parameter))
        target.requires_grad_(parameter.requires_grad)
    return copy.to(device())


def randomise(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    for _, parameter in parameters:
        parameter.data.normal_(0, 0.2, generator=generator)


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


def make_batch(step: int) -> Any:
    from afd_scale.types import Batch

    names = tuple(f"prompt {number}" for number in range(PROMPTS))
    latents = draw(PROMPTS, FRAMES, SHAPE["latent_channels"], SIZE, SIZE, seed=10 + step)
    samples = tuple(range(PROMPTS * step, PROMPTS * (step + 1)))
    return Batch(names, names, samples, draw(PROMPTS, 5, SHAPE["text_dim"], seed=20 + step), latents)


def draw(*shape: Any, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device())


def device() -> torch.device:
    """Where `start_ranks` computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def close(ours: Tensor, expected: Tensor, what: str) -> None:
    assert ours.shape == expected.shape, what
    difference = (ours.detach() - expected.detach()).abs().max().item()
    assert difference < TOLERANCE, f"{what}: differs by {difference}"


@pytest.mark.parametrize(("data", "sequence"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_every_mesh_equals_one_process(data: int, sequence: int, tmp_path: Path) -> None:
    result = torchrun(data * sequence, __file__, tmp_path, str(sequence), timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]


if __name__ == "__main__":
    check_matrix(Path(sys.argv[1]), int(sys.argv[2]))
