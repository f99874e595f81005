"""The GAN under ZeRO-3 on data x sequence ranks against plain torch in one process: gradients through the discriminator
and steps; and a run of adapters on shared videos that resumes to the same bits.

Run as a script by torchrun this file is one rank; as a test it starts them.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.meshes import OF_ROWS, Results, check_cells, randomise_adapters, run_mesh, steps_of, weights_of
from tests.distributed.processes import ROOT, leave
from tests.distributed.small_run import SHAPE as STUDENT
from tests.distributed.small_run import check_resuming, write_small_run
from tests.distributed.test_parity import LORA, OPTIMIZER, PROMPTS, SHAPE, SIZE, make_batch, save_start
from tests.tools import load_tool

STEPS, FRAMES, RUN_STEPS = 2, 3, 3
# LoRA, recomputation, micro-batch, objective, which judge
CELLS = [
    (False, True, 1, "bradley_terry", "latent"),
    (True, False, None, "softplus", "latent"),
    (False, False, None, "bradley_terry", "conv"),
    (False, True, 3, "bradley_terry", "features"),
]


def run_config(
    folder: Path, sequence: int, lora: bool, checkpointing: bool, micro_batch: int | None, objective: str, judge: str
) -> Any:
    from afd_scale.config import RunConfig

    shared = {**SHAPE, "activation_checkpointing": checkpointing, "lora": LORA if lora else None}
    judges = {"latent": {"name": "latent", **shared, "num_layers": 1},
              "features": {"name": "latent", **shared, "weights": folder / "student", "features": (1, 2),
                           "head_channels": 4},
              "conv": {"name": "conv", "channels": 4, "identity_patch": (3, 1)}}  # fmt: skip
    return RunConfig.model_validate({
        "student": {**shared, "weights": folder / "student"},
        "sampler": {"timesteps": [1000, 500], "window_frames": 2, "sink_frames": 1},
        "data": {"latent_frames": FRAMES, "latent_height": SIZE, "latent_width": SIZE, "global_batch": PROMPTS},
        "evaluation": {"metrics": "none"},
        "parallel": {"sequence": sequence},
        "rollout": {"weights": "sharded" if checkpointing else "gathered"},
        "train": {"micro_batch": micro_batch},
        "method": {
            "name": "gan", "optimizer": OPTIMIZER, "discriminator_optimizer": OPTIMIZER, "rollouts_per_prompt": 2,
            "discriminator_objective": objective, "r1_weight": 0.1, "r2_weight": 0.1, "ema_decay": 0.8,
            "discriminator": judges[judge],
        },
    })  # fmt: skip


def check_mesh(folder: Path, sequence: int) -> None:
    if not (folder / "student").exists():
        save_start(folder)

    def ready(engines: Any) -> None:
        for role in ("student", "discriminator"):
            randomise_adapters(engines[role])
        engines["average"].follow(engines["student"], 0.0)

    cells = {str(cell): partial(run_config, folder, sequence, *cell) for cell in CELLS}
    check_cells(folder, sequence, cells, results_of, ready)


def results_of(method: Any, engines: Any, rows: slice, mean: Any) -> Results:
    found: Results = {}
    for step in range(1, STEPS + 1):
        batch, judge = make_batch(step, rows), engines["discriminator"]
        _, gradient = judge.input_gradient(batch.teacher, lambda logits: 100 * logits.sin().sum())
        assert gradient.abs().max() > 1e-2
        found[f"{OF_ROWS}gradient through the discriminator, step {step}"] = gradient
        found |= steps_of(method, {step: batch}, mean)
        assert found[f"student/rollout_distance of step {step}"] < 1e-4
    return found | weights_of({role: engines[role] for role in ("student", "average", "discriminator")})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What plain torch computes; one sharded rank, which records it, is held to it at once."""
    folder = tmp_path_factory.mktemp("gan")
    run_mesh(__file__, folder, 1, 1)
    return folder


@pytest.mark.parametrize(("data", "sequence"), [(2, 1), (1, 2)])
def test_gan_on_two_ranks_equals_one_process(data: int, sequence: int, recorded: Path) -> None:
    run_mesh(__file__, recorded, data, sequence)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_small_run(tmp_path_factory.mktemp("gan"), RUN_STEPS)
    tree: dict[str, Any] = yaml.safe_load(path.read_text())
    tree["method"] = {"name": "gan", "optimizer": {"learning_rate": 1e-3}, "ema_decay": 0.9, "r1_weight": 0.1,
                      "discriminator": {"name": "latent", **STUDENT, "num_layers": 1, "lora": {"rank": 2}},
                      "discriminator_warmup_steps": 1, "discriminator_optimizer": {"learning_rate": 1e-3}}  # fmt: skip
    tree |= {"name": "gan", "evaluation": {"metrics": "none"}}
    tree["student"] |= {"lora": {"rank": 4}}
    tree |= {"parallel": {"sequence": 2}}
    tree["train"] |= {"save_every": 1, "keep_checkpoints": RUN_STEPS}
    path.write_text(yaml.safe_dump(tree))
    return path


def test_gan_trains_saves_and_resumes_to_the_same_bits(config_file: Path) -> None:
    last = check_resuming(config_file.parent / "runs" / "gan", RUN_STEPS, "--config", config_file)
    assert sorted(path.name for path in (last / "networks").iterdir()) == ["average", "discriminator", "student"]


@pytest.mark.parametrize("name", ["toy/gan.yaml", "wan_1_3b/paper_gan.yaml"])
def test_gan_is_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_tool("plan").main(["--config", str(ROOT / "configs" / name), "--gpus", "8", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert list(plan["phases"]) == ["rollout", "discriminator", "judgement", "student"]
    judgement, update = (plan["phases"][phase]["bytes_received"] for phase in ("judgement", "discriminator"))
    assert judgement["reduce"] == 0 < update["reduce"]
    assert plan["phases"]["judgement"]["memory"]["optimizer_step"] == 0
    assert plan["phases"]["student"]["flops"]["total"] > 0


if __name__ == "__main__":
    check_mesh(Path(sys.argv[1]), int(sys.argv[2]))
    leave()
