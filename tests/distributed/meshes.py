"""Sharded methods against the same ones in plain torch: what tests of several meshes of ranks share."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.distributed.processes import on_ranks

TOLERANCE = 1e-3 if torch.cuda.is_available() else 1e-4  # a GPU adds in any order
OF_ROWS = "of rows: "  # a result with a row a video, of which a rank has its share

Results = dict[str, Tensor]


def run_mesh(script: str, folder: Path, data: int, sequence: int, timeout: int = 600) -> None:
    """`script FOLDER SEQUENCE` on data x sequence ranks."""
    result = on_ranks(data * sequence, script, folder, str(sequence), timeout=timeout)
    assert result.returncode == 0, result.stderr[-3000:]


def check_cells(
    folder: Path, sequence: int, config_of: Mapping[str, Callable[[], Any]], results_of: Callable[..., Results],
    ready: Callable[[Any], None],
) -> None:  # fmt: skip
    """Every rank: each cell for this mesh; one rank alone records the plain results first.

    Args:
        config_of: makes the config of a cell.
        results_of: all that is compared, on some rows of the global batch: (method, engines by role, rows, mean over
            ranks).
        ready: prepares the engines of a cell, by role, before anything is computed.
    """
    from afd_scale.parallel.launchers import launched_as
    from afd_scale.parallel.ranks import start_ranks
    from afd_scale.training.build import build_run

    with start_ranks(launched_as(os.environ), timeout_minutes=2) as processes:
        ranks = processes.sharing_videos(sequence, timeout_minutes=2)
        for cell, make_config in config_of.items():
            config = make_config()
            run, prompts = build_run(config, ranks), config.data.global_batch
            ready(run.engines)
            recorded = folder / f"{cell}.safetensors"
            if ranks.size == 1:
                plain = results_of(*plain_run(run.engines, config), slice(0, prompts), lambda x: x)
                save_file(on_cpu(plain), recorded)
            share = prompts // ranks.data_size
            rows = slice(ranks.data_rank * share, (ranks.data_rank + 1) * share)
            ours = results_of(run.method, run.engines, rows, ranks.mean)
            compare(on_cpu(ours), load_file(recorded), rows, f"{ranks.data_size}x{sequence}, {cell}")


def on_cpu(results: Results) -> Results:
    return {name: value.detach().float().cpu().contiguous() for name, value in results.items()}


def steps_of(method: Any, batches: Mapping[int, Any], mean: Callable[[Tensor], Tensor]) -> Results:
    """Metrics of training steps, means over the ranks."""
    found = {}
    for step, batch in batches.items():
        metrics = method.train_step(batch, step)
        for name in sorted(metrics):
            if not name.endswith("accuracy"):  # a count may tip over
                found[f"{name} of step {step}"] = mean(metrics[name])
    return found


def weights_of(engines: Mapping[str, Any]) -> Results:
    return {f"{role}: {name} at the end": weight
            for role, engine in engines.items() for name, weight in whole_weights(engine)}  # fmt: skip


def compare(ours: Results, expected: Results, rows: slice, cell: str) -> None:
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        reference = expected[name][rows] if name.startswith(OF_ROWS) else expected[name]
        assert value.shape == reference.shape, f"{cell}: {name}"
        scale = reference.abs().max().clamp(min=1e-3) if name.startswith("gradient") else 1.0
        assert reference.abs().max() > 0 or not name.startswith("gradient"), f"{cell}: {name} is all zero"
        difference = ((value.cpu() - reference) / scale).abs().max().item()
        assert difference < TOLERANCE, f"{cell}: {name} differs by {difference}"


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


def plain_run(sharded: Mapping[str, Any], config: Any) -> tuple[Any, Mapping[str, Any]]:
    """A run's method and engines, on plain copies of its sharded networks, which are given by role."""
    from afd_scale.engines.cast import build_cast
    from afd_scale.engines.plain import Plain
    from afd_scale.engines.shards import whole_weight
    from afd_scale.methods import make_method

    engines = build_cast(config, Plain(config, device()))
    for role, engine in engines.items():
        for name, parameter in sharded[role].network.named_parameters():
            engine.network.get_parameter(name).data.copy_(whole_weight(parameter))
    return make_method(config, engines, lambda x: x), engines


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


def draw(*shape: Any, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device())


def device() -> torch.device:
    """Where `start_ranks` computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
