"""Golden curves: ten steps of every method on the toy world, in full precision, as they were logged before.

A refactor reproduces them. A change of the numbers explains the new file in the same commit: a run's metrics.jsonl
without what is not learned (`NOT_LEARNED`), as this test filters it. Machines round otherwise, which the tolerance
covers; on the machine that made them the difference is 0.
"""

import json
import sys
from pathlib import Path

import pytest

from tests.distributed.processes import ROOT, run
from tests.distributed.small_run import SHAPE, write_small_run

CURVES = ROOT / "tests" / "golden" / "curves"
METHODS = {
    "afd": [],
    "dmd": [
        f"method={{name: dmd, fake_score: {SHAPE}, student_every: 2, ema_decay: 0.9, "
        "optimizer: {learning_rate: 1.0e-3}, fake_score_optimizer: {learning_rate: 1.0e-3}, "
        "discriminator_warmup_steps: 2}"
    ],
    "gan": [
        "method={name: gan, rollouts_per_prompt: 2, ema_decay: 0.9, optimizer: {learning_rate: 1.0e-3}, "
        "r1_weight: 0.1, discriminator_optimizer: {learning_rate: 5.0e-5, epsilon: 1.0e-6}, "
        "discriminator_warmup_steps: 2}"
    ],
    "sft": ["method={name: sft, ema_decay: 0.9, optimizer: {learning_rate: 3.0e-3}}", "data.global_batch=16"],
}
TOLERANCE = 1e-3
NOT_LEARNED = ("system/", "compute/", "alarm/")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_as_before(name: str, tmp_path: Path) -> None:
    golden = json.loads((CURVES / f"{name}.json").read_text())
    config = write_small_run(tmp_path, steps=len(golden))
    overrides = [f"name={name}", "evaluation.metrics=none", *METHODS[name]]
    done = run(sys.executable, ROOT / "launch" / "train.py", "--config", config, *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["step"] > 0]
    assert len(steps) == len(golden)
    for found, expected in zip(steps, golden, strict=True):
        assert {key for key in found if not key.startswith(NOT_LEARNED)} == expected.keys()
        for key in expected.keys() - {"discriminator/accuracy"}:  # a count may tip over
            assert found[key] == pytest.approx(expected[key], rel=TOLERANCE, abs=TOLERANCE), (found["step"], key)


def test_every_method_has_a_curve() -> None:
    from afd_scale.config.methods import METHODS as OURS

    assert OURS.keys() == METHODS.keys() == {path.stem for path in CURVES.glob("*.json")}
