"""DMD under ZeRO-3 on data x sequence ranks against plain torch in one process: steps, with adapters on the fake score
whose base is the real one, or not; and a run of adapters on shared videos that resumes to the same bits.

Run as a script by torchrun this file is one rank; as a test it starts them.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.meshes import Results, check_cells, randomise_adapters, run_mesh, steps_of, weights_of
from tests.distributed.processes import ROOT, leave
from tests.distributed.small_run import check_resuming, write_small_run
from tests.distributed.test_parity import LORA, OPTIMIZER, PROMPTS, SHAPE, SIZE, make_batch, save_start
from tests.tools import load_tool

STEPS, FRAMES, RUN_STEPS = 2, 3, 3
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
    if not (folder / "student").exists():
        save_start(folder)

    def ready(engines: Any) -> None:
        for role in ("student", "fake_score"):
            randomise_adapters(engines[role])
        engines["average"].follow(engines["student"], 0.0)

    cells = {str(cell): partial(run_config, folder, sequence, *cell) for cell in CELLS}
    check_cells(folder, sequence, cells, results_of, ready)


def results_of(method: Any, engines: Any, rows: slice, mean: Any) -> Results:
    found = steps_of(method, {step: make_batch(step, rows) for step in range(1, STEPS + 1)}, mean)
    for step in range(1, STEPS + 1):
        assert (f"student/loss of step {step}" in found) == (step % 2 == 0)
    return found | weights_of({role: engines[role] for role in ("student", "average", "fake_score", "real_score")})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What plain torch computes; one sharded rank, which records it, is held to it at once."""
    folder = tmp_path_factory.mktemp("dmd")
    run_mesh(__file__, folder, 1, 1)
    return folder


@pytest.mark.parametrize(("data", "sequence"), [(2, 1), (1, 2)])
def test_dmd_on_two_ranks_equals_one_process(data: int, sequence: int, recorded: Path) -> None:
    run_mesh(__file__, recorded, data, sequence)


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
    last = check_resuming(config_file.parent / "runs" / "dmd", RUN_STEPS, "--config", config_file)
    assert sorted(path.name for path in (last / "networks").iterdir()) == CHANGING


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
