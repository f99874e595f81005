"""AFD on rollouts longer than the teacher's clips, on real ranks: a resumed run goes on exactly, and ranks that share a
video do as those that do not."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import ROOT, on_ranks
from tests.distributed.small_run import check_resuming, without_machine, write_small_run

TRAIN = ROOT / "launch" / "train.py"
STEPS = 3
LONG = (
    "sampler.window_frames=2", "sampler.sink_frames=1", "data.source.begin=[0, 12]", "evaluation.metrics=none",
    "method.long_rollouts={frames: 12, from_frames: 8, growth_steps: 1, context_frames: 2, early_share: 0.1}",
    "method.judged_frames=2", "sampler.timesteps=[1000, 500]", "train.micro_batch=1",
    "student.lora={rank: 4, alpha: 8}",
)  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_run(tmp_path_factory.mktemp("long"), STEPS)


def lines(config: Path, name: str) -> list[dict[str, Any]]:
    text = (config.parent / "runs" / name / "metrics.jsonl").read_text()
    return [without_machine(json.loads(line)) for line in text.splitlines()]


def test_a_resumed_run_goes_on_exactly_and_ranks_change_nothing(config: Path) -> None:
    options = ("--config", config, *LONG, "train.save_every=1", "train.keep_checkpoints=3")
    check_resuming(config.parent / "runs" / "two", STEPS, *options, "name=two")
    result = on_ranks(2, TRAIN, *options, "name=shared", "parallel.sequence=2")
    assert result.returncode == 0, result.stderr[-3000:]
    two, shared = lines(config, "two"), lines(config, "shared")
    assert {name for line in two for name in line} > {"discriminator/accuracy/2x", "rollout/reward_mean/2x"}
    for one, other in zip(two, shared, strict=True):
        assert one.keys() == other.keys(), "the same times are drawn"
        for name in one:
            if "accuracy" not in name:  # a count may tip over
                assert one[name] == pytest.approx(other[name], abs=1e-3), (one["step"], name)
