"""Host time of a transformer block behind DeepSpeed's hooks, as one rank of many sees it: a script on a CPU.

    python tests/unit/budgets/host_cost.py --ranks 64 [--lora] [section.key=value ...]

A fake process group stands for the other ranks, and gathers and reductions return at once and move nothing (torch's
fake ones would copy for each rank), so what is left is Python and the launches of small tensors. Values are
meaningless. A process has one process group, so each call of this script measures one number of ranks, and prints one
JSON line: milliseconds of CPU time a block, the least of several passes; how many functions a block calls, Python's
and C's; the ratios of both to the same network without DeepSpeed; and how many collectives a block launched, whose own
time is not in it. Calls are the same on every machine and under any load, so the budgets are of them.

    plain_forward, plain_training        the modules alone; a training pass recomputes each block and goes backward
    sharded_forward, sharded_training    gathered block by block
    resident_forward                     with all weights kept whole, as a rollout runs
    gather                               of weights before the resident passes, once a phase
"""

import argparse
import cProfile
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

LAYERS, WIDTH, FRAMES, ROWS = 6, 256, 3, 8  # small, so that little of the time is arithmetic; shards need no padding
REPEATS = 5

Measured = dict[str, float]


class Instant:
    """A collective of DeepSpeed's that is done before it began; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *tensors: Any, **options: Any) -> "Instant":
        self.calls += 1
        return self

    def wait(self) -> None:
        """As of the handle of an asynchronous collective."""


def measure(ranks: int, lora: bool, overrides: list[str]) -> tuple[Measured, Measured, Measured]:
    """Milliseconds, calls and collectives a block, of one process, which can do it once.

    Args:
        ranks: of the pretended run.
        lora: adapters of student and old policy are trained, instead of all weights.
        overrides: of the config, `section.key=value`.
    """
    import torch

    launched = join_fake_group(ranks)

    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    from afd_scale.engines.sharded import TrainedNetwork, build_sharded
    from afd_scale.engines.shards import Residency
    from afd_scale.layers.lora import Adapters
    from afd_scale.layers.ops import ModelOps
    from afd_scale.models.build import train_part
    from afd_scale.models.wan import CausalWan

    # Ranks compare the order of their modules while a trace is recorded; there is nobody to compare with.
    coordinator.assert_ints_same_as_other_ranks = lambda *arguments, **options: None
    config = config_of(ranks, lora, overrides)
    names, adapter = ("student", "old_policy") if lora else (), "student" if lora else None

    def build(*names: str | None) -> CausalWan:
        adapters = Adapters(tuple(filter(None, names)), 16, 1.0) if any(names) else None
        return CausalWan(config.student, config.sampler, ModelOps(adapters=adapters))

    network = build_sharded(config, partial(build, *names), None)
    if lora:
        train_part(network, adapter)
    residency = Residency("gathered", 0, ranks, lambda here: here)
    sharded = TrainedNetwork(
        config, network, config.method.optimizer, adapter=adapter, residency=residency, build=build
    )  # fmt: skip
    plain = build(*names)
    if lora:
        train_part(plain, adapter)
    inputs = torch.randn(1, FRAMES, 16, 4, 4), torch.full((1, FRAMES), 500.0), torch.randn(1, ROWS, 32)

    def plain_training() -> None:
        plain(*inputs, adapter=adapter).square().mean().backward()

    def sharded_training() -> None:
        sharded.backward(sharded(*inputs).square().mean())

    times: Measured = {}
    calls: Measured = {}
    collectives: Measured = {}

    def record(name: str, call: Callable[[], Any]) -> None:
        times[name] = per_block(call)
        before = launched.calls
        calls[name] = calls_of(call) / LAYERS
        collectives[name] = (launched.calls - before) / LAYERS

    with torch.no_grad():
        record("plain_forward", lambda: plain(*inputs, adapter=adapter))
        record("sharded_forward", lambda: sharded(*inputs))
        before = time.process_time()
        with sharded.resident():
            times["gather"] = (time.process_time() - before) * 1e3 / LAYERS
            record("resident_forward", lambda: sharded(*inputs))
    record("plain_training", plain_training)
    record("sharded_training", sharded_training)
    return times, calls, collectives


def join_fake_group(ranks: int) -> Instant:
    """Be rank 0 of so many, none of which is there; the collective that runs instead of DeepSpeed's."""
    os.environ.update(RANK="0", LOCAL_RANK="0", LOCAL_SIZE="1", WORLD_SIZE=str(ranks))
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed("fake", auto_mpi_discovery=False, verbose=False)
    from deepspeed.comm import comm

    instant = Instant()
    comm.cdb.all_gather_function = comm.cdb.reduce_scatter_function = instant
    return instant


def config_of(ranks: int, lora: bool, overrides: list[str]) -> Any:
    """A run of a small student whose blocks have as many parameters as Wan's."""
    from afd_scale.config.load import load_config

    student = {
        "dim": WIDTH, "ffn_dim": 2 * WIDTH, "num_heads": 4, "num_layers": LAYERS, "freq_dim": 32, "text_dim": 32,
        "text_length": ROWS, "latent_channels": 16, "prediction": "velocity", "activation_checkpointing": True,
        "lora": {"rank": 16} if lora else None,
    }  # fmt: skip
    return load_config(
        Path(__file__).parents[3] / "configs" / "wan_1_3b" / "paper_sft.yaml",
        [f"student={json.dumps(student)}", f"data.global_batch={ranks}", "precision=fp32", "parallel.sequence=1",
         "train.micro_batch=null", *overrides],
    )  # fmt: skip


def per_block(call: Callable[[], Any]) -> float:
    """Milliseconds of CPU time a block, the least of several calls; two before them warm up."""
    times = []
    for _ in range(2 + REPEATS):
        before = time.process_time()
        call()
        times.append(time.process_time() - before)
    return min(times[2:]) * 1e3 / LAYERS


def calls_of(call: Callable[[], Any]) -> int:
    """How many functions of Python and C it calls, in this thread."""
    with cProfile.Profile() as profile:
        call()
    return sum(entry.callcount for entry in profile.getstats())


def over_plain(measured: Measured) -> Measured:
    """Ratios to the modules alone."""
    return {
        name: measured[name] / measured[f"plain_{name.split('_')[1]}"]
        for name in ("sharded_forward", "resident_forward", "sharded_training")
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, required=True, help="of the pretended run")
    parser.add_argument("--lora", action="store_true", help="train adapters")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    warnings.simplefilter("ignore")
    with redirect_stdout(sys.stderr):  # where DeepSpeed's remarks go
        times, calls, collectives = measure(options.ranks, options.lora, options.overrides)
    print(json.dumps({"ranks": options.ranks, "lora": options.lora, "milliseconds": times, "calls": calls,
                      "ratios": over_plain(times), "ratios_of_calls": over_plain(calls),
                      "collectives": collectives}))  # fmt: skip
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # fake groups do not wind down
