"""Networks behind DeepSpeed ZeRO-3 against the same networks in plain torch: outputs, updates, averages, checkpoints.

Run as a script by torchrun this file is one rank; as a test it starts them.
"""

import copy
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.distributed.processes import leave, on_ranks

STEPS = 3
SHAPE = {"dim": 32, "ffn_dim": 40, "num_heads": 2, "num_layers": 2, "freq_dim": 8, "text_dim": 6, "text_length": 5,
         "latent_channels": 12, "prediction": "velocity"}  # fmt: skip


def check_all(folder: Path) -> None:
    """Every rank: each comparison, in one process group."""
    from afd_scale.config import RunConfig
    from afd_scale.config.sampler import SamplerConfig
    from afd_scale.engines.sharded import AveragedPolicy, ShardedNetwork, TrainedNetwork, build_sharded, freeze
    from afd_scale.parallel.launchers import launched_as
    from afd_scale.parallel.ranks import start_ranks
    from afd_scale.rollout.sampler import Noise, Sampler
    from tests.networks import make_policy

    config = RunConfig.model_validate({"method": "sft", "student": SHAPE, "seed": 5})
    optimizer = config.method.optimizer.model_copy(update={"gradient_norm": 0.05, "weight_decay": 0.1})

    def build() -> nn.Module:
        return make_policy(SHAPE)

    with start_ranks(launched_as(os.environ), timeout_minutes=2) as ranks:
        plain = randomised(build())
        trained = TrainedNetwork(config, build_sharded(config, build, plain.state_dict()), optimizer)
        average = AveragedPolicy(freeze(config, build_sharded(config, build, plain.state_dict())))
        frozen = ShardedNetwork(freeze(config, build_sharded(config, build, plain.state_dict())))
        plain_average, plain_frozen = copy.deepcopy(plain), copy.deepcopy(plain)
        plain_optimizer = torch.optim.AdamW(plain.parameters(), betas=optimizer.betas, weight_decay=0.1)
        assert all(
            p.ds_tensor.numel() * ranks.size < 2 * max(p.ds_numel, ranks.size) for p in frozen.network.parameters()
        ), "every rank holds its share only"

        for step in range(1, STEPS + 1):
            noisy, timestep, text, clean = inputs(step)
            rows = slice(ranks.rank * 4 // ranks.size, (ranks.rank + 1) * 4 // ranks.size)
            for gradient in (True, False):  # of the clean context: one joint pass, or a pass of its own
                velocity = trained(noisy[rows], timestep[rows], text[rows], clean=clean[rows], clean_gradient=gradient)
                loss = velocity.square().mean()
                trained.backward(loss)
                norm = trained.step(0.01 * step)
                expected = plain(noisy, timestep, text, clean=clean, clean_gradient=gradient)
                assert_close(velocity, expected[rows], f"forward of step {step}, context gradient {gradient}")
                expected.square().mean().backward()
                expected_norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
                assert_close(norm.reshape(()), expected_norm, f"gradient norm of step {step}")
                plain_optimizer.param_groups[0]["lr"] = 0.01 * step
                plain_optimizer.step()
                plain_optimizer.zero_grad()
            average.follow(trained, 0.7)
            for mine, new in zip(plain_average.parameters(), plain.parameters(), strict=True):
                mine.data.lerp_(new.data, 0.3)

            sampler = Sampler(SamplerConfig(timesteps=(1000, 500), timestep_shift=1.0))
            for sharded, unsharded, name in (
                (trained, plain, "trained"), (average, plain_average, "average"), (frozen, plain_frozen, "frozen")
            ):  # fmt: skip
                made = [sampler.rollout(policy, text, Noise(noisy, noisy[None])) for policy in (sharded, unsharded)]
                assert_close(*made, f"rollout of the {name} one")

        for network, unsharded in ((trained, plain), (average, plain_average)):
            weights = dict(network.full_weights())
            assert weights.keys() == unsharded.state_dict().keys()
            for name, weight in unsharded.state_dict().items():
                assert_close(weights[name], weight, name)

        folder.mkdir(exist_ok=True)
        ranks.barrier()
        for name, network in (("trained", trained), ("average", average)):
            network.snapshot(folder / name).write(folder / name, ranks.rank, ranks.size)
        before = [network(*inputs(9)[:3]).detach() for network in (trained, average)]
        noisy, timestep, text, clean = inputs(8)
        trained.backward(trained(noisy, timestep, text).square().mean())
        trained.step(0.5)
        average.follow(trained, 0.1)
        changed = [network(*inputs(9)[:3]).detach() for network in (trained, average)]
        for name, network in (("trained", trained), ("average", average)):
            network.load(folder / name)
        for old, new, network in zip(before, changed, (trained, average), strict=True):
            assert (old - new).abs().max() > 1e-3
            assert torch.equal(network(*inputs(9)[:3]), old), "a checkpoint restores the weights bit by bit"
        check_bf16(ranks)


def check_bf16(ranks: Any) -> None:
    """A step in bf16: plain torch takes the ranks' rows one by one, adds their bf16 gradients up in float32 and
    steps float32 copies of the weights. Were they added up in bf16, they would be off by 2e-3 of their norm."""
    from deepspeed.utils import safe_get_full_grad

    from afd_scale.config import RunConfig
    from afd_scale.engines.sharded import TrainedNetwork, build_sharded
    from tests.networks import make_policy

    # With micro-batches gradients stay in float32 after they are reduced; without, they are rounded once.
    config = RunConfig.model_validate(
        {"method": "sft", "student": SHAPE, "precision": "bf16", "train": {"micro_batch": 1}}
    )
    changes = {"gradient_norm": 0.05, "weight_decay": 0.1, "epsilon": 1e-4}
    optimizer = config.method.optimizer.model_copy(update=changes)

    def build() -> nn.Module:
        return make_policy(SHAPE)

    plain = randomised(build()).bfloat16()
    trained = TrainedNetwork(config, build_sharded(config, build, plain.state_dict()), optimizer)
    masters = {name: nn.Parameter(weight.detach().float()) for name, weight in plain.named_parameters()}
    noisy, timestep, text, clean = inputs(7)
    for rank in range(ranks.size):
        rows = slice(rank * 4 // ranks.size, (rank + 1) * 4 // ranks.size)
        loss = plain(noisy[rows], timestep[rows], text[rows], clean=clean[rows]).square().mean()
        for name, gradient in zip(masters, torch.autograd.grad(loss, list(plain.parameters())), strict=True):
            share = gradient.float() / ranks.size
            masters[name].grad = share if rank == 0 else masters[name].grad + share
        if rank == ranks.rank:
            trained.backward(trained(noisy[rows], timestep[rows], text[rows], clean=clean[rows]).square().mean())
    for name, weight in trained.network.named_parameters():
        expected = masters[name].grad
        error = ((safe_get_full_grad(weight) - expected).norm() / expected.norm()).item()
        assert error < (1e-2 if reads_text(name) else 1e-5), f"gradient of {name} in bf16: off by {error}"
    trained.step(0.01)
    nn.utils.clip_grad_norm_(masters.values(), 0.05)
    torch.optim.AdamW(masters.values(), lr=0.01, betas=optimizer.betas, eps=1e-4, weight_decay=0.1).step()
    for name, weight in trained.full_weights():
        # A whole step is 1e-2.
        assert_close(weight, masters[name], f"{name} after a step in bf16", 1e-3 if reads_text(name) else 1e-4)


def reads_text(name: str) -> bool:
    """Every block reads the text: autograd adds up what they send back, in bf16, and in another order here."""
    return name.startswith("text_embedding")


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return model


def inputs(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """noisy, timestep, text, clean of the global batch."""
    generator = torch.Generator().manual_seed(step)
    noisy, clean = (torch.randn(4, 4, 12, 4, 4, generator=generator) for _ in range(2))
    return noisy, 1000 * torch.rand(4, 4, generator=generator), torch.randn(4, 5, 6, generator=generator), clean


def assert_close(ours: Tensor, expected: Tensor, what: str, allowed: float = 1e-4) -> None:
    difference = (ours.detach() - expected.detach()).abs().max().item()
    assert difference < allowed, f"{what}: differs by {difference}"


def test_sharded_equals_unsharded(tmp_path: Path) -> None:
    result = on_ranks(2, __file__, tmp_path / "checkpoint")
    assert result.returncode == 0, result.stderr[-3000:]


if __name__ == "__main__":
    check_all(Path(sys.argv[1]))
    leave()
