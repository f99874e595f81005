"""Emulated FP8 behind ZeRO-3, blocks recomputed, against the same network in one process: outputs, gradients, update.

A scale is that of one rank's rows, so the process takes the ranks' rows one after the other. Run as a script by
torchrun this file is one rank; as a test it starts them.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.distributed.processes import leave, on_ranks

SHAPE = {"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "freq_dim": 8, "text_dim": 6, "text_length": 5,
         "latent_channels": 12, "prediction": "velocity", "activation_checkpointing": True}  # fmt: skip


def check_all() -> None:
    """Every rank, in one process group."""
    from deepspeed.utils import safe_get_full_grad

    from afd_scale.config import RunConfig
    from afd_scale.engines.sharded import TrainedNetwork, build_sharded
    from afd_scale.layers.fp8_emulated import EmulatedFp8
    from afd_scale.layers.ops import ModelOps
    from afd_scale.parallel.launchers import launched_as
    from afd_scale.parallel.ranks import start_ranks
    from tests.networks import make_policy

    def build() -> nn.Module:
        return make_policy(SHAPE, ModelOps(EmulatedFp8()))

    with start_ranks(launched_as(os.environ), timeout_minutes=2) as ranks:
        shares = [slice(rank * 4 // ranks.size, (rank + 1) * 4 // ranks.size) for rank in range(ranks.size)]
        mine = shares[ranks.rank]
        config = RunConfig.model_validate({"method": "sft", "student": SHAPE})
        optimizer = config.method.optimizer.model_copy(update={"gradient_norm": 0.0, "weight_decay": 0.0})
        plain = randomised(build())
        trained = TrainedNetwork(config, build_sharded(config, build, plain.state_dict()), optimizer)
        velocity = forward(trained, mine)
        trained.backward(velocity.square().mean())
        for share in shares:
            expected = forward(plain, share)
            (expected.square().mean() / ranks.size).backward()
            if share == mine:
                assert_close(velocity, expected, "forward")
        gradients = {name: weight.grad for name, weight in plain.named_parameters()}
        for name, weight in trained.engine.module.named_parameters():
            assert_close(
                safe_get_full_grad(weight) / gradients[name].norm(), gradients[name] / gradients[name].norm(), name
            )
        trained.step(0.01)
        torch.optim.AdamW(plain.parameters(), lr=0.01, betas=optimizer.betas, weight_decay=0.0).step()
        weights = dict(trained.full_weights())
        assert weights.keys() == make_policy(SHAPE).state_dict().keys()
        for name, weight in plain.state_dict().items():
            assert_close(weights[name], weight, name)

        # As in a run, with parameters in bf16.
        config = RunConfig.model_validate({"method": "sft", "student": SHAPE, "precision": "fp8"})
        trained = TrainedNetwork(config, build_sharded(config, build, plain.state_dict()), optimizer)
        velocity = forward(trained, mine)
        assert torch.equal(velocity, forward(plain.bfloat16(), mine)), "forward in bf16"
        trained.backward(velocity.square().mean())
        assert trained.step(0.01).isfinite()


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return model


def forward(network: Callable[..., Tensor], rows: slice) -> Tensor:
    """Velocity of some rows of the global batch, under teacher forcing."""
    generator = torch.Generator().manual_seed(1)
    noisy, clean = (torch.randn(4, 4, 12, 4, 4, generator=generator) for _ in range(2))
    timestep, text = 1000 * torch.rand(4, 4, generator=generator), torch.randn(4, 5, 6, generator=generator)
    return network(noisy[rows], timestep[rows], text[rows], clean=clean[rows])


def assert_close(ours: Tensor, expected: Tensor, what: str) -> None:
    difference = (ours.detach() - expected.detach()).abs().max().item()
    assert difference < 1e-5, f"{what}: differs by {difference}"


def test_sharded_fp8_equals_one_process() -> None:
    result = on_ranks(2, __file__)
    assert result.returncode == 0, result.stderr[-3000:]


if __name__ == "__main__":
    check_all()
    leave()
