"""VBench's own numbers (arXiv:2311.17982), by its package.

VBench 0.1.5 needs numpy 1 and transformers 4.33, so it lives in an environment of its own and is run by that one's
Python. Its models are downloaded by itself.
"""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from afd_scale.config import ConfigError
from afd_scale.evaluation.suites import vbench_process
from afd_scale.evaluation.suites.suite import Metric
from afd_scale.files import read_json

PREFIX = "vbench_"


class _Video(TypedDict):
    video_path: str
    video_results: Any


class _Answer(TypedDict):
    """What `vbench_process.py` writes: VBench's number for each dimension, and those of the videos."""

    standard: bool
    files: dict[str, str]
    results: dict[str, tuple[float, list[_Video]]]


_ANSWER = TypeAdapter(_Answer)


@dataclass(frozen=True)
class Scores:
    """What VBench said.

    Attributes:
        standard: whether it was its benchmark, on its own prompts.
        dimensions: its number for each.
        values: of each video, by metric, where it has a number for one.
    """

    standard: bool
    dimensions: dict[str, float]
    values: dict[Path, dict[str, float]]


def check_vbench(python: str) -> None:
    """Before anything is measured.

    Raises:
        ConfigError: this Python has no VBench.
    """
    try:
        done = _run(python, "-c", "import vbench")
        reason = (done.stderr.strip().splitlines() or [""])[-1] if done.returncode else None
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        raise ConfigError(f"vbench ({python}) must be a Python in whose environment VBench is installed (pip install "
                          f"vbench, in another environment than this): {reason}")  # fmt: skip


def vbench_scores(python: str, videos: Mapping[Path, str]) -> Scores:
    """Let VBench judge videos.

    Args:
        python: of its environment.
        videos: files with their prompts.
    Raises:
        ConfigError: it failed.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        asked = [[str(file.resolve()), prompt] for file, prompt in videos.items()]
        (folder / "request.json").write_text(json.dumps({"videos": asked, "folder": place}))
        script = folder / "process.py"
        shutil.copy(vbench_process.__file__, script)  # beside this file it would import it as `vbench`
        done = _run(python, str(script), str(folder / "request.json"))
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
            raise ConfigError(f"vbench ({python}) must run: {last}")
        answer = read_json(folder / "answer.json", "vbench", "be an answer of VBench's", _ANSWER)
    given = {str(file.resolve()): file for file in videos}
    values: dict[Path, dict[str, float]] = {file: {} for file in videos}
    for dimension, (_, found) in answer["results"].items():
        for one in found:
            score = one["video_results"]
            if isinstance(score, int | float):
                values[given[answer["files"][Path(one["video_path"]).name]]][PREFIX + dimension] = float(score)
    return Scores(answer["standard"], {name: float(score) for name, (score, _) in answer["results"].items()}, values)


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True)


def metric_of(name: str) -> Metric:
    """Of a metric that `Scores.values` has."""
    words = name.removeprefix(PREFIX).replace("_", " ")
    return Metric(f"VBench {words}", "higher", "by VBench's own package")
