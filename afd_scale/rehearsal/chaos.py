"""Kill a run again and again, start it anew each time, and see whether it comes to the same bits as one left alone."""

import json
import logging
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors import safe_open

from afd_scale.checkpoint.weights import complete_checkpoints
from afd_scale.config import ConfigError, RunConfig, resolved_yaml

log = logging.getLogger(__name__)

WHOM = ("rank", "all", "launcher")  # who is killed
WHEN = ("start", "rollout", "step", "write")  # as far as it can be aimed at from outside
_TRAIN = Path(__file__).parents[2] / "launch" / "train.py"
_POLL_SECONDS = 0.005
_END_SECONDS = 60.0  # for ranks to end by themselves when another, or their launcher, is gone


@dataclass(frozen=True)
class Kill:
    """One of the kills.

    Attributes:
        step: that is finished before it.
        whom: of WHOM.
        when: of WHEN: before the first new step, at the beginning of one, in it, or while a checkpoint is written.
        fraction: of what `when` lasts, before the kill.
        orphans: processes that had not ended by themselves in a minute.
    """

    step: int
    whom: str
    when: str
    fraction: float
    orphans: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of a run that was killed.

    Attributes:
        different: the first thing that is not as in the run that was left alone; None where all is.
        seconds: of the run left alone, and of the other with all its starts.
    """

    kills: list[Kill]
    different: str | None
    seconds: tuple[float, float]


def plan_kills(count: int, steps: int, seed: int) -> list[Kill]:
    """Kills spread over a run: each of WHOM and of WHEN as often as the others, in an order by chance."""
    chance = random.Random(seed)
    whom = _shuffled(WHOM, count, chance)
    when = _shuffled(WHEN, count, chance)
    at = sorted(chance.randrange(steps) for _ in range(count))
    return [Kill(*each, chance.random()) for each in zip(at, whom, when, strict=True)]


def run_chaos(config: RunConfig, kills: list[Kill], ranks: int, folder: Path, seed: int = 0) -> Outcome:
    """The run left alone, and the run killed, side by side in a folder.

    Args:
        config: of the run; it logs each step here.
    Raises:
        ConfigError: it does not come to its end even when it is left alone.
    """
    settled = config.model_copy(update={"train": config.train.model_copy(update={"log_every": 1, "trackers": ()})})
    alone, killed = (_Job(settled, folder / name, ranks) for name in ("alone", "killed"))
    log.info("%s, left alone: %s", config.name, alone.folder)
    began = time.monotonic()
    alone.run_to_end()
    step_seconds = alone.step_seconds()
    chance, done, middle = random.Random(seed), list[Kill](), time.monotonic()
    for number, kill in enumerate(kills, start=1):
        log.info("kill %d of %d: %s, %s, after step %d", number, len(kills), kill.whom, kill.when, kill.step)
        done.append(killed.run_to_kill(kill, step_seconds, chance))
    log.info("from here on it is left alone")
    killed.run_to_end()
    ended = time.monotonic()
    return Outcome(done, _difference(alone.folder, killed.folder), (middle - began, ended - middle))


class _Job:
    """A run that is started with torchrun, as often as need be."""

    def __init__(self, config: RunConfig, out: Path, ranks: int):
        out.mkdir(parents=True)
        self.folder, self._ranks, self._log = out / config.name, ranks, out / "log.txt"
        self._config = out / "config.yaml"
        self._config.write_text(resolved_yaml(config.model_copy(update={"out": out})))

    def run_to_end(self) -> None:
        with self._started() as launcher:
            if launcher.wait() != 0:
                raise ConfigError(
                    f"config ({self._config}) must be of a run that comes to its end: {self._last_words()}"
                )

    def run_to_kill(self, kill: Kill, step_seconds: float, chance: random.Random) -> Kill:
        """Start it, kill as planned, and wait until nothing of it is left; how it went."""
        with self._started() as launcher:
            before = self.steps()
            aims: dict[str, Callable[[], bool]] = {
                "start": lambda: bool(_family(launcher)[1:]),
                "rollout": lambda: self.steps() > max(kill.step, before),
                "step": lambda: self.steps() > max(kill.step, before),
                "write": lambda: self.steps() > kill.step and self._is_writing(),
            }
            while not aims[kill.when]():
                if launcher.poll() is not None:  # it came to its end before, or to none
                    return self._too_late(kill, launcher)
                time.sleep(_POLL_SECONDS)
            lasts = {"start": 10.0, "rollout": 0.3 * step_seconds, "step": step_seconds, "write": 0.02}
            time.sleep(kill.fraction * lasts[kill.when])
            return self._kill(kill, launcher, chance)

    def steps(self) -> int:
        """The last one that is logged."""
        with suppress(OSError, ValueError, IndexError):
            return int(json.loads((self.folder / "metrics.jsonl").read_text().splitlines()[-1])["step"])
        return 0

    def step_seconds(self) -> float:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        seconds = sorted(json.loads(line).get("system/step_seconds", 0.0) for line in lines)
        return float(seconds[len(seconds) // 2])

    def _kill(self, kill: Kill, launcher: "subprocess.Popen[bytes]", chance: random.Random) -> Kill:
        family = _family(launcher)
        ranks = family[1:]
        doomed = {"rank": [chance.choice(ranks)] if ranks else family, "all": family, "launcher": family[:1]}
        for process in doomed[kill.whom]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(family, timeout=_END_SECONDS)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        launcher.wait()
        return Kill(kill.step, kill.whom, kill.when, kill.fraction, len(alive))

    def _too_late(self, kill: Kill, launcher: "subprocess.Popen[bytes]") -> Kill:
        if launcher.returncode != 0:
            raise ConfigError(f"config ({self._config}) must go on after a kill: {self._last_words()}")
        raise ConfigError(f"kills ({kill.step}) must come before the end: there was no {kill.when} after step "
                          f"{kill.step}; train.save_every says how often there is one")  # fmt: skip

    def _is_writing(self) -> bool:
        return any((self.folder / "checkpoints").glob(".step_*.partial"))

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error:")]
        return (errors or lines or ["it said nothing"])[-1]

    @contextmanager
    def _started(self) -> Iterator["subprocess.Popen[bytes]"]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self._ranks}",
                   str(_TRAIN), "--config", str(self._config)]  # fmt: skip
        with self._log.open("ab") as output:
            launcher = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            yield launcher
        finally:
            for process in _family(launcher):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            launcher.wait()


def _family(launcher: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """The launcher and its ranks."""
    try:
        process = psutil.Process(launcher.pid)
        ranks = [child for child in process.children() if str(_TRAIN) in child.cmdline()]
    except psutil.NoSuchProcess:
        return []
    return [process, *ranks]


def _difference(alone: Path, killed: Path) -> str | None:
    """The first thing in which two runs differ: metrics but those of the machine, what was measured, all tensors."""
    metrics = [_metrics(folder) for folder in (alone, killed)]
    for first, second in zip(*metrics, strict=False):
        if first != second:
            names = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
            return f"metrics.jsonl, step {first['step']}: {', '.join(names)}"
    if len(metrics[0]) != len(metrics[1]):
        return f"metrics.jsonl: {len(metrics[0])} steps and {len(metrics[1])}"
    measured = [json.loads((folder / "summary.json").read_text())["metrics"] for folder in (alone, killed)]
    if measured[0] != measured[1]:
        return "summary.json: metrics"
    last = [complete_checkpoints(folder / "checkpoints")[-1] for folder in (alone, killed)]
    files = [{path.relative_to(folder) for path in folder.rglob("*.safetensors")} for folder in last]
    if files[0] != files[1] or last[0].name != last[1].name:
        return f"checkpoints: {last[0].name} and {last[1].name}"
    for name in sorted(files[0]):
        with safe_open(last[0] / name, "pt") as first, safe_open(last[1] / name, "pt") as second:
            for key in {*first.keys(), *second.keys()}:
                if not torch.equal(first.get_tensor(key), second.get_tensor(key)):
                    return f"{last[0].name}/{name}: {key}"
    return None


def _metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("system/")} for line in lines]


def _shuffled(values: tuple[str, ...], count: int, chance: random.Random) -> list[str]:
    several = (values * (count // len(values) + 1))[:count]
    return chance.sample(several, count)
