"""Studies whose runs train nothing: they leave what a run leaves, or fail, in milliseconds."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from afd_scale.config import resolved_yaml
from afd_scale.study.plan import Plan, Trial
from afd_scale.study.results import Record
from afd_scale.study.runs import Place
from afd_scale.study.sections import Study

ROOT = Path(__file__).parents[3]
AFD, SFT = "configs/toy/smoke/afd.yaml", "configs/toy/sft.yaml"
RATES = {"field": "method.optimizer.learning_rate", "values": [1e-4, 2e-4]}
CHOOSE = {"seeds": [100, 101], "metric": "trajectory_fd", "better": "lower"}

Score = Callable[[Trial], float]

# Arguments: folder of the run, what it leaves there, by file name.
LEAVE = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir(exist_ok=True)
for name, text in json.loads(sys.argv[2]).items():
    (folder / name).write_text(text)
"""


def make_plan(**fields: Any) -> Plan:
    study = {"title": "A study", "seeds": [0, 1], "metrics": ["trajectory_fd", "sharpness"],
             "methods": {"afd": {"config": AFD}, "sft": {"config": SFT}}}  # fmt: skip
    return Plan(Study.model_validate(study | fields), ROOT)


def record(trial: Trial, score: float, **fields: Any) -> Record:
    """Of a complete run, without its files."""
    values = {
        "name": trial.name, "method": trial.method, "base": trial.base, "rate": trial.rate, "seed": trial.seed,
        "steps": trial.steps, "metrics": metrics(score), "teacher_clips": 8, "clips_read": 16,
        "pflop": trial.steps / 10, "seconds": 2.0, "calls": 19, "command": "python launch/train.py",
    }  # fmt: skip
    return Record.model_validate(values | fields)


def metrics(score: float) -> dict[str, dict[str, float]]:
    return {"base": {"trajectory_fd": 10.0, "sharpness": 0.5}, "teacher": {"trajectory_fd": 0.1, "sharpness": 1.0},
            "student": {"trajectory_fd": score, "sharpness": 0.8}}  # fmt: skip


def by_name(trials: list[Trial], score: Score) -> dict[str, Record]:
    return {trial.name: record(trial, score(trial)) for trial in trials}


def left_by(trial: Trial, place: Place, score: float) -> Mapping[str, str]:
    """Files of a complete run."""
    summary = {"steps": trial.steps, "suite": "toy", "metrics": metrics(score), "seconds": {"train": 1.5}}
    head = "# date: 2026-01-02 03:04 UTC\n# git_commit: abc\n"
    return {"config.yaml": head + resolved_yaml(trial.run_config(place.out)), "summary.json": json.dumps(summary)}


class StandIn:
    """Commands of runs, which are noted.

    Args:
        score: of each run's student.
        instead: a script in place of a run's, by its name.
    """

    def __init__(self, place: Place, score: Score = lambda trial: 1.0, instead: Mapping[str, str] | None = None):
        self.place, self.score, self.instead = place, score, instead or {}
        self.started: list[str] = []

    def __call__(self, trial: Trial) -> list[str]:
        self.started.append(trial.name)
        left = json.dumps(left_by(trial, self.place, self.score(trial)))
        return [sys.executable, "-c", self.instead.get(trial.name, LEAVE), str(self.place.folder(trial)), left]
