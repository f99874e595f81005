"""The stages of a run, each by the command that a user types: train, save, stop, go on, export, generate.

A stage is a process of its own with a log of its own. One that fails, or does not leave what it should, ends the
rehearsal; what was to come is said to be not reached.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from afd_scale.checkpoint.weights import complete_checkpoints
from afd_scale.codecs.wan import NAME as WAN
from afd_scale.config import RunConfig
from afd_scale.data.schema import DatasetFacts
from afd_scale.rehearsal.outcome import Outcome
from afd_scale.rehearsal.shrink import SAVE_EVERY, Layout

NAMES = ("train and save", "SIGTERM", "resume and finish", "export", "generate")
LIMIT_SECONDS = 400.0  # of a stage: many times what it takes, and a hang does not go on for ever
LAST_LINES = 12
MORE_STEPS = 2  # after the resume
PROMPT = "a red ball falls on the moon"
_POLL_SECONDS = 0.1


class StageError(Exception):
    """What a stage did not do."""


class LeftOutError(Exception):
    """Why a stage has nothing to do."""


@dataclass(frozen=True)
class Place:
    """Where stages run.

    Attributes:
        root: of the source tree, for its entry points.
        config: YAML of the small run.
        logs: folder of their logs.
        out: folder of what is exported and generated.
        layout: ranks.
        limit_seconds: of a stage.
    """

    root: Path
    config: Path
    logs: Path
    out: Path
    layout: Layout
    limit_seconds: float = LIMIT_SECONDS

    def train(self, *overrides: str) -> list[str]:
        """The command of a start."""
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                str(self.layout.ranks), str(self.root / "launch" / "train.py"), "--config", str(self.config),
                *overrides]  # fmt: skip

    def tool(self, name: str, *arguments: object) -> list[str]:
        """The command of a tool."""
        return [sys.executable, str(self.root / "tools" / f"{name}.py"), *map(str, arguments)]


def run_stages(config: RunConfig, place: Place, begins: Callable[[str], None]) -> Iterator[Outcome]:
    """A row for each stage, as it ends.

    Args:
        config: of the small run, which `place.config` holds.
        begins: is told the name of each.
    """
    place.logs.mkdir(parents=True, exist_ok=True)
    stages = (
        _train_and_stop(config, place),
        _one("resume and finish", place, lambda log: _resume(config, place, log)),
        _one("export", place, lambda log: _export(config, place, log)),
        _one("generate", place, lambda log: _generate(config, place, log)),
    )
    left = list(NAMES)
    for stage in stages:
        begins(left[0])
        with closing(stage):
            for outcome in stage:
                left.remove(outcome.stage)
                yield outcome
                if outcome.status == "failed":
                    yield from not_reached(left)
                    return


def not_reached(names: Sequence[str] = NAMES) -> Iterator[Outcome]:
    """Rows of stages behind one that failed."""
    return (Outcome(name, "", "not reached") for name in names)


def _train_and_stop(config: RunConfig, place: Place) -> Generator[Outcome]:
    """A start that is told to stop behind its first checkpoint."""
    log, began = place.logs / "train.log", time.monotonic()
    with _running(place.train(), log) as process:
        try:
            first = _first_checkpoint(config, process, began + place.limit_seconds)
        except StageError as error:
            yield _failed(NAMES[0], error, began, log)
            return
        said = f"{place.layout}; {_networks(config)}; {first.name} is saved"
        yield Outcome(NAMES[0], said, "ok", time.monotonic() - began, log)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        try:
            code = _wait(process, began + place.limit_seconds)
            saved, last = _saved_step(config), _logged_steps(config)[-1]
            if saved != last or f"was told to stop and saved step {saved}" not in log.read_text(errors="replace"):
                raise StageError(f"it did not save and stop: its last step was {last}, the last one saved is {saved}")
        except StageError as error:
            yield _failed(NAMES[1], error, began, log)
            return
    said = f"saved step {saved} and ended (exit code {code} of torchrun)"
    yield Outcome(NAMES[1], said, "ok", time.monotonic() - began, log)


def _one(name: str, place: Place, do: Callable[[Path], str]) -> Generator[Outcome]:
    """A stage of one command.

    Args:
        do: takes the log's file, and says what was done.
    """
    log, began = place.logs / f"{name.partition(' ')[0]}.log", time.monotonic()
    try:
        said = do(log)
    except StageError as error:
        yield _failed(name, error, began, log)
    except LeftOutError as reason:
        yield Outcome(name, str(reason), "left out")
    else:
        yield Outcome(name, said, "ok", time.monotonic() - began, log)


def _resume(config: RunConfig, place: Place, log: Path) -> str:
    saved = _saved_step(config)
    last = saved + MORE_STEPS
    _run(place.train(f"train.steps={last}"), log, place)
    if " resumes after step " not in log.read_text(errors="replace"):
        raise StageError("it did not say that it resumes")
    steps = [step for step in _logged_steps(config) if step > 0]
    if steps != list(range(1, last + 1)):
        raise StageError(f"its metrics must be of the steps 1 to {last}, each once: they are of {steps}")
    for name in ("summary.json", "report.html"):
        if not (config.folder / name).is_file():
            raise StageError(f"it left no {name}")
    return f"went on after step {saved} to step {last}, evaluated, wrote its summary and report"


def _export(config: RunConfig, place: Place, log: Path) -> str:
    out = place.out / "exported"
    _run(place.tool("convert_checkpoint", config.folder, out, "--to", "diffusers"), log, place)
    return f"--to diffusers: {', '.join(sorted(path.name for path in out.iterdir()))}"


def _generate(config: RunConfig, place: Place, log: Path) -> str:
    """From what was exported, with the text encoder where there is one, else from the data's embeddings."""
    out, data = place.out / "videos", config.data
    if config.codec.models is not None:
        rows, columns = 8 * data.latent_height, 8 * data.latent_width
        asked: list[object] = ["--prompt", PROMPT, "--models", config.codec.models, "--size", f"{rows}x{columns}",
                               "--frames", 1 + 4 * (data.latent_frames - 1)]  # fmt: skip
    elif DatasetFacts.load(Path(data.shards), "data.shards").codec.startswith(WAN):
        raise LeftOutError("codec.models (null) names no VAE: nothing decodes latents")
    else:
        asked = ["--dataset", data.shards, "--max-prompts", 1]
    _run(place.tool("generate", place.out / "exported", *asked, "--out", out, "--json"), log, place)
    videos = [path for path in out.glob("*.mp4") if path.stat().st_size]
    if not videos:
        raise StageError(f"it left no video in {out}")
    return f"of the exported student: {videos[0].name}"


def _networks(config: RunConfig) -> str:
    roles = ", ".join(role.name for role in config.cast)
    return f"{config.method.name} with {roles}; {config.precision}"


def _first_checkpoint(config: RunConfig, process: subprocess.Popen[bytes], deadline: float) -> Path:
    """The first one that `train.save_every` is the reason of."""
    path = config.folder / "checkpoints" / f"step_{SAVE_EVERY:08d}"
    while not path.exists():
        if process.poll() is not None:
            raise StageError(f"exit code {process.returncode} before its first checkpoint")
        if time.monotonic() > deadline:
            raise StageError("no checkpoint in time")
        time.sleep(_POLL_SECONDS)
    return path


def _run(command: Sequence[str], log: Path, place: Place) -> None:
    with _running(command, log) as process:
        code = _wait(process, time.monotonic() + place.limit_seconds)
    if code:
        raise StageError(f"exit code {code}")


@contextmanager
def _running(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose output goes into a log; at the end it and all that it started are gone."""
    # Ranks that share few cores take longer to save than torchrun waits for by itself, half a minute.
    environment = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(LIMIT_SECONDS)), **os.environ}
    with log.open("wb") as file:
        file.write((" ".join(command) + "\n").encode())
        file.flush()
        process = subprocess.Popen(
            list(command), stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                _end(psutil.Process(process.pid))
            process.wait()


def _end(process: psutil.Process) -> None:
    """At once, with all that it started: torchrun's ranks lead groups of their own, and would go on."""
    for each in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            each.kill()


def _wait(process: subprocess.Popen[bytes], deadline: float) -> int:
    try:
        return process.wait(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise StageError("it did not end in time") from None


def _failed(stage: str, error: StageError, began: float, log: Path) -> Outcome:
    lines = _without_torchrun(log.read_text(errors="replace").rstrip().splitlines()[1:]) if log.is_file() else []
    errors = [line for line in lines if line.startswith("error: ")]
    said = errors[0].removeprefix("error: ") if errors else str(error)
    return Outcome(stage, said, "failed", time.monotonic() - began, log, tuple(lines[-LAST_LINES:]))


def _without_torchrun(lines: list[str]) -> list[str]:
    """What ranks printed: the traceback that torchrun ends with when one fails says nothing of why."""
    for number, line in enumerate(lines):
        if line.startswith("Traceback") and "<frozen runpy>" in "".join(lines[number + 1 : number + 2]):
            lines = lines[:number]
            break
    return [line for line in lines if "torch/distributed/elastic/" not in line]


def _logged_steps(config: RunConfig) -> list[int]:
    lines = (config.folder / "metrics.jsonl").read_text().splitlines()
    return [int(json.loads(line)["step"]) for line in lines]


def _saved_step(config: RunConfig) -> int:
    """Of the newest complete checkpoint."""
    newest = complete_checkpoints(config.folder / "checkpoints")[-1]
    state: dict[str, Any] = json.loads((newest / "state.json").read_text())
    return int(state["step"])
