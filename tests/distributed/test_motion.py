"""The judge of motion under ZeRO-3 against plain torch, and a whole run of AFD with it as its second judge.

Logits, gradients and steps of AFD on one rank and on two, float32. Run as a script by torchrun this file is one rank;
as a test it starts them.
"""

import sys
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed import test_vlm
from tests.distributed.meshes import check_cells, run_mesh
from tests.distributed.processes import ROOT, leave
from tests.distributed.small_run import check_resuming

CELLS = {
    "tracks": {"features": "tracks", "mismatch_weight": 0.3, "augment": ["mirror", "brightness", "shift"]},
    "tracks, penalised": {"features": "tracks", "r1_weight": 0.1, "r2_weight": 0.2},
    "flow": {"features": "flow", "grid": 2, "workers": 1},
}


def check_mesh(folder: Path, sequence: int) -> None:
    cells = {
        cell: partial(test_vlm.run_config, {"name": "motion", "channels": 8, **fields}, number, sequence)
        for number, (cell, fields) in enumerate(CELLS.items())
    }
    check_cells(folder, sequence, cells, test_vlm.results_of, lambda engines: None)


@pytest.mark.timeout(600)
def test_one_and_two_ranks_equal_plain_torch(tmp_path: Path) -> None:
    for data, sequence in ((1, 1), (2, 1), (1, 2)):
        run_mesh(__file__, tmp_path, data, sequence)


def test_a_run_with_two_judges_resumes_to_the_same_bits(tmp_path: Path) -> None:
    last = check_resuming(
        tmp_path / "runs" / "toy-afd-motion", 4, "--config", ROOT / "configs" / "toy" / "afd_motion.yaml",
        f"data.shards={tmp_path / 'shards'}", "data.source.clips=64", "data.global_batch=8",
        f"out={tmp_path / 'runs'}", "train.steps=4", "train.log_every=1", "train.save_every=2",
        "method.discriminator.warmup_steps=1", "method.judges.motion.warmup_steps=2", "evaluation.metrics=none",
        "evaluation.samples=0",
    )  # fmt: skip
    names = load_file(min((last / "networks" / "motion").iterdir()))
    assert any("convolutions.0.weight" in name for name in names)


if __name__ == "__main__":
    check_mesh(Path(sys.argv[1]), int(sys.argv[2]))
    leave()
