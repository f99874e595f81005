"""A study for real: two starts share two runs, whose students are measured again."""

import json
from pathlib import Path

import pytest
import yaml

from afd_scale.config import load_config
from tests.distributed.processes import ROOT, environment, side_by_side
from tests.distributed.small_run import write_small_run


@pytest.mark.slow
def test_two_starts_share_the_runs_of_a_study(tmp_path: Path) -> None:
    config = write_small_run(tmp_path, steps=2)
    timesteps = list(load_config(config).sampler.timesteps)
    study = {
        "title": "Two runs", "overrides": ["train.trackers=[]"], "seeds": [0],
        "metrics": ["trajectory_fd", "sharpness"],
        "methods": {
            "afd": {"config": str(config)},
            "mixed": {"like": "afd", "overrides": ["method.policy_mix=0.5"]},
            "same": {"of": "afd", "sampler": [f"sampler.timesteps={timesteps}"]},
            "one_step": {"of": "mixed", "sampler": ["sampler.timesteps=[1000]"]},
        },
    }  # fmt: skip
    path, out = tmp_path / "study.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(study))
    command = [str(ROOT / "tools/compare.py"), str(path), "--out", str(out), "--jobs", "1"]
    done = side_by_side([command, command], [environment(), environment()], timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    logs = {log.stem: log.read_text() for log in out.glob("*.log")}
    trained = ("afd-base-own-0-2", "mixed-base-own-0-2")
    assert all(logs[name].count("is complete; look at") == 1 for name in trained), "each once"
    found = {run["name"]: run["metrics"]["student"] for run in json.loads((out / "results.json").read_text())["runs"]}
    assert len(found) == 4
    assert found.keys() == logs.keys()
    assert found["same-base-own-0-2"] == pytest.approx(found["afd-base-own-0-2"], rel=1e-3)
    assert found["one_step-base-own-0-2"] != pytest.approx(found["mixed-base-own-0-2"], rel=1e-3)
    assert "| afd | 2 |" in (out / "table.md").read_text()
    assert (out / "samples" / "grid.png").exists()
    assert "<video" in (out / "index.html").read_text()
