"""A finished run's student, measured once more as at the run's end: with another sampler, on more clips."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afd_scale.config import ConfigError, load_config
from afd_scale.data.check import check_dataset
from afd_scale.evaluation.report import write_report
from afd_scale.evaluation.run_files import CONFIG, SUMMARY, read_summary
from afd_scale.files import full_disk_explained, write_text
from afd_scale.generation.student import load_student
from afd_scale.parallel.ranks import alone
from afd_scale.training.build import build_codec
from afd_scale.training.evaluator import Evaluator
from afd_scale.training.run_folder import write_config

CHANGED = ("sampler.", "evaluation.")


def measure_again(run: Path, out: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Make a folder as a run leaves one, without checkpoints; one that is there with the same settings is made again.

    Args:
        run: folder of a complete run.
        overrides: `sampler.` and `evaluation.` of it.
    Returns:
        summary.json: metrics of student and teacher.
    Raises:
        ConfigError: the run is not complete, or something else is overridden.
        ValueError: its student cannot be read.
    """
    for override in overrides:
        if not override.startswith(CHANGED):
            raise ConfigError(f"override ({override}) must be of {' or '.join(CHANGED)}: the run is finished")
    done = read_summary(run)
    if done is None:
        raise ConfigError(f"run ({run}) must be complete: it has no {SUMMARY}")
    where = [f"name={json.dumps(out.name)}", f"out={json.dumps(str(out.parent))}"]
    config = load_config(run / CONFIG, [*overrides, *where])
    if config.evaluation.metrics == "none":
        raise ConfigError("evaluation.metrics (none) must be a suite: there is nothing to measure")
    began, ranks = time.monotonic(), alone()
    codec = build_codec(config.codec, check_dataset(config).codec, ranks.device)
    evaluator = Evaluator(config, ranks, codec)
    evaluator.check()
    student = load_student(
        run, ranks, precision=config.precision, attention=config.attention, sampler=config.sampler.model_dump()
    )  # fmt: skip
    with full_disk_explained(out, "out"):
        write_config(config, ranks.size)
        found = evaluator.compare(student.network)
        summary = {
            "method": config.method.name,
            "steps": done["steps"],
            "suite": config.evaluation.metrics,
            **found.summary,
            "seconds": {"evaluate": round(time.monotonic() - began, 2)},
        }
        write_text(out / SUMMARY, json.dumps(summary, indent=1) + "\n")
        write_report(out)
    return summary
