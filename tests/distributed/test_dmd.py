"""DMD under ZeRO-3 on data x sequence ranks against plain torch in one process: steps, with adapters on the fake score
whose base is the real one, or not; and a run of adapters on shared videos that resumes to the same bits.

Run as a script by torchrun this file is one rank; as a test it starts them.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.distributed.processes import ROOT, leave, on_ranks
from tests.distributed.small_run import write_small_run
from tests.distributed.test_parity import (
    LORA,
    OPTIMIZER,
    PROMPTS,
    SHAPE,
    SIZE,
    Results,
    compare,
    make_batch,
    plain_method,
    randomise_adapters,
    save_start,
    whole_weights,
)
from tests.tools import load_tool

STEPS, FRAMES, RUN_STEPS = 4, 3, 3
CHANGING = ["average", "discriminator", "fake_score", "student"]
# LoRA, recomputation, micro-batch, causal scores, GAN term
CELLS = [(False, True, 1, False, False), (True, False, None, False, False), (False, False, None, True, True)]


def run_config(
    folder: Path, sequence: int, lora: bool, checkpointing: bool, micro_batch: int | None, causal: bool, gan: bool
) -> Any:
    from afd_scale.config import RunConfig

    shared = {**SHAPE, "activation_checkpointing": checkpointing, "lora": LORA if lora else None,
              "weights": folder / "student"}  # fmt: skip
    return RunConfig.model_validate({
        "student": shared,
        "sampler": {"timesteps": [1000, 500], "window_frames": 2, "sink_frames": 1},
        "data": {"latent_frames": FRAMES, "latent_height": SIZE, "latent_width": SIZE, "global_batch": PROMPTS},
        "evaluation": {"metrics": "none"},
        "parallel": {"sequence": sequence},
        "rollout": {"weights": "sharded" if checkpointing else "gathered"},
        "train": {"micro_batch": micro_batch},
        "method": {
            "name": "dmd", "optimizer": OPTIMIZER, "discriminator_optimizer": OPTIMIZER, "rollouts_per_prompt": 2,
            "fake_score": {**shared, "causal": causal}, "fake_score_optimizer": OPTIMIZER, "student_every": 2,
            "guidance_scale": 3.0, "ema_decay": 0.8, "gan_weight": 0.1 if gan else 0.0,
            "discriminator": {"name": "conv", "channels": 4, "identity_patch": (3, 1)},
        },
    })  # fmt: skip


def check_mesh(folder: Path, sequence: int) -> None:
    """Every rank: each cell for this mesh; one rank alone records the plain results first."""
    from afd_scale.parallel.launchers import launched_as
    from afd_scale.parallel.ranks import start_ranks
    from afd_scale.training.build import build_run

    with start_ranks(launched_as(os.environ), timeout_minutes=2) as processes:
        ranks = processes.sharing_videos(sequence, timeout_minutes=2)
        if ranks.size == 1:
            save_start(folder)
        for number, cell in enumerate(CELLS):
            config = run_config(folder, sequence, *cell)
            sharded: Any = build_run(config, ranks).method
            for trained in (sharded.student, sharded.fake_score):
                randomise_adapters(trained)
            sharded.average.follow(sharded.student, 0.0)
            recorded = folder / f"{number}.safetensors"
            if ranks.size == 1:
                plain = results_of(plain_method(sharded, config), slice(0, PROMPTS), lambda x: x)
                save_file({name: value.contiguous() for name, value in plain.items()}, recorded)
            share = PROMPTS // ranks.data_size
            rows = slice(ranks.data_rank * share, (ranks.data_rank + 1) * share)
            name = f"{ranks.data_size}x{sequence}, {cell}"
            compare(results_of(sharded, rows, ranks.mean), load_file(recorded), rows, name)


def results_of(method: Any, rows: slice, mean: Any) -> Results:
    """All that is compared, of sharded or plain engines, on some rows of the global batch."""
    found: Results = {}
    for step in range(1, STEPS + 1):
        batch = make_batch(step, rows)
        metrics = method.train_step(batch, step)
        for name in sorted(metrics.keys() - {"discriminator/accuracy"}):  # a count may tip over
            found[f"{name} of step {step}"] = mean(metrics[name])
        assert ("student/loss" in metrics) == (step % 2 == 0)
    for policy in ("student", "average", "fake_score", "real_score"):
        for name, weight in whole_weights(getattr(method, policy)):
            found[f"{policy}: {name} at the end"] = weight
    return {name: value.detach().float().cpu() for name, value in found.items()}


def run_mesh(folder: Path, data: int, sequence: int) -> None:
    result = on_ranks(data * sequence, __file__, folder, str(sequence))
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What plain torch computes; one sharded rank, which records it, is held to it at once."""
    folder = tmp_path_factory.mktemp("dmd")
    run_mesh(folder, 1, 1)
    return folder


@pytest.mark.parametrize(("data", "sequence"), [(2, 1), (1, 2)])
def test_dmd_on_two_ranks_equals_one_process(data: int, sequence: int, recorded: Path) -> None:
    run_mesh(recorded, data, sequence)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_small_run(tmp_path_factory.mktemp("dmd"), RUN_STEPS)
    tree: dict[str, Any] = yaml.safe_load(path.read_text())
    tree["method"] = {"name": "dmd", "optimizer": {"learning_rate": 1e-3}, "ema_decay": 0.9, "gan_weight": 0.1,
                      "fake_score": {"causal": True, **tree["student"], "lora": {"rank": 4}}, "student_every": 1,
                      "discriminator_warmup_steps": 1, "discriminator_optimizer": {"learning_rate": 1e-3}}  # fmt: skip
    tree |= {"name": "dmd", "evaluation": {"metrics": "none"}}
    tree["student"] |= {"lora": {"rank": 4}}
    tree |= {"parallel": {"sequence": 2}}
    tree["train"] |= {"save_every": 1, "keep_checkpoints": RUN_STEPS}
    path.write_text(yaml.safe_dump(tree))
    return path


def test_dmd_trains_saves_and_resumes_to_the_same_bits(config_file: Path) -> None:
    folder = config_file.parent / "runs" / "dmd"
    last = folder / "checkpoints" / f"step_{RUN_STEPS:08d}"
    found = []
    for _ in range(2):
        result = on_ranks(2, ROOT / "launch" / "train.py", "--config", config_file)
        assert result.returncode == 0, result.stderr[-3000:]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        files = {path.name: load_file(path) for path in last.rglob("*.safetensors")}
        assert sorted(path.name for path in (last / "networks").iterdir()) == CHANGING
        found.append(([without_machine(line) for line in lines], files))
        shutil.rmtree(last)
        (folder / "summary.json").unlink()
    assert "resumes after step 2" in result.stderr
    (lines, files), (again, files_again) = found
    assert lines == again
    assert len({line["student/loss"] for line in lines if line["step"] > 0}) == RUN_STEPS
    for name, tensors in files.items():
        assert all(torch.equal(tensor, files_again[name][key]) for key, tensor in tensors.items()), name


def without_machine(line: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in line.items() if not name.startswith("system/")}


@pytest.mark.parametrize("name", ["toy/dmd.yaml", "wan_1_3b/paper_dmd.yaml"])
def test_dmd_is_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_tool("plan").main(["--config", str(ROOT / "configs" / name), "--gpus", "8", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert list(plan["phases"]) == ["rollout", "fake_score", "scores", "student"]
    scores, update = (plan["phases"][phase]["bytes_received"] for phase in ("scores", "fake_score"))
    assert scores["reduce"] == 0 < update["reduce"]
    assert all(phase["flops"]["total"] > 0 for phase in plan["phases"].values())


if __name__ == "__main__":
    check_mesh(Path(sys.argv[1]), int(sys.argv[2]))
    leave()
