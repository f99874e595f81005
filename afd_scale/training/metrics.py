"""What a run says of itself while it trains: metrics.jsonl, what its trackers get, alarms, a progress line."""

import errno
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from afd_scale.evaluation.alarms import SuiteMetrics
from afd_scale.evaluation.run_files import read_metrics
from afd_scale.files import write_text
from afd_scale.progress import progress
from afd_scale.training.alarms import Watch
from afd_scale.training.trackers import Tracker, tell

log = logging.getLogger(__name__)

SHOWN_METRICS = ("student/loss", "rollout/reward_mean", "discriminator/accuracy", "system/step_seconds")


class Recorder:
    """Takes a logged step and its metrics; on the main rank, elsewhere nothing happens.

    Attributes:
        standing: alarms that are on after it, with what there is to say of each.
    """

    def __init__(self) -> None:
        self.standing: Mapping[str, str] = {}

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        pass


class _Lines:
    """Whole lines at the end of a file; those that a full disk does not take are kept until it takes them."""

    def __init__(self, path: Path):
        self.path, self.kept = path, b""

    def add(self, line: str) -> None:
        before, self.kept = self.kept, self.kept + f"{line}\n".encode()
        try:
            with self.path.open("ab", buffering=0) as file:
                end = file.tell()
                if file.write(self.kept) < len(self.kept):
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.kept = b""
        except OSError as error:
            if not before:
                log.warning("%s cannot be written (%s): its lines are kept until it can be", self.path, error.strerror)

    def close(self) -> None:
        if self.kept:
            log.warning("%s lacks the last %d lines", self.path, self.kept.count(b"\n"))


class _MainRecorder(Recorder):
    def __init__(self, lines: _Lines, trackers: list[Tracker], watch: Watch, show: Callable[[int, str], None]):
        self.lines, self.trackers, self.watch, self.show = lines, trackers, watch, show
        self.standing = watch.standing

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        line: dict[str, float | None] = {"step": step}
        for key, value in metrics.items():
            line[key] = value if math.isfinite(value) else None
            if line[key] is None:
                log.warning("%s is %s at step %d; written as null", key, value, step)
        flags = self.watch.see(line)
        self.standing = self.watch.standing
        tell(self.trackers, lambda tracker: tracker.metrics(step, {**metrics, **flags}))
        self.lines.add(json.dumps(line | flags))
        self.show(step, "  ".join(f"{key} {metrics[key]:.3g}" for key in SHOWN_METRICS if key in metrics))


@contextmanager
def recording(
    name: str, folder: Path, steps: range, trackers: list[Tracker], suite_metrics: SuiteMetrics, *, is_main: bool
) -> Iterator[Recorder]:
    """Record the logged steps of a run, on its main rank; what an earlier attempt wrote of these steps is dropped.

    Args:
        name, folder: of the run.
        steps: that are to be done, to the last of the run.
        suite_metrics: by which alarms read diagnostics.
    Yields:
        Takes a step that is done, and its metrics; a value that is not finite is written as null, with a warning.
    """
    if not is_main:
        yield Recorder()
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    watch = Watch(name, _drop_later_steps(path, steps.start - 1), suite_metrics)
    zero = min(steps.start - 1, 0)  # a warm-up's steps are numbered up to 0
    with (
        closing(_Lines(path)) as lines,
        progress(name, begun=steps.start - 1 - zero, say=log.info) as show,
    ):
        last = steps.stop - 1 - zero
        yield _MainRecorder(lines, trackers, watch, lambda step, shown: show(step - zero, last, shown))


def _drop_later_steps(path: Path, last_step: int) -> list[dict[str, float | None]]:
    """Keep the lines up to a step, and return them; the old file stays until the new one is complete."""
    if not path.exists():
        return []
    kept = [record for record in read_metrics(path) if record["step"] <= last_step]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept
