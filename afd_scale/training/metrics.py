"""What a run says of itself while it trains: metrics.jsonl, tensorboard events, a progress line.

Both classes are made on every rank and do nothing where they are not enabled, so callers need no rank test;
`contextlib.closing` ends them.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

from afd_scale.evaluation.report import read_metrics

log = logging.getLogger(__name__)

SHOWN_METRICS = ("student/loss", "rollout/reward_mean", "discriminator/accuracy")


class MetricsWriter:
    """Appends to `<folder>/metrics.jsonl` and to tensorboard events in `<folder>/tensorboard`."""

    def __init__(self, folder: Path, enabled: bool, resume_step: int = 0) -> None:
        """
        Args:
            folder: of the run; made when absent.
            enabled: True on rank 0 only.
            resume_step: last step that counts; what an earlier attempt wrote of later steps is dropped.
        """
        self._enabled = enabled
        if not enabled:
            return
        # Loads slowly, and only one rank needs it.
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        _drop_later_steps(path, resume_step)
        self._file = path.open("a", buffering=1)
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step's metrics; a value that is not finite becomes null, with a warning."""
        if not self._enabled:
            return
        record: dict[str, float | None] = {"step": step}
        for name, value in metrics.items():
            number = float(value)
            self._events.add_scalar(name, number, step)
            record[name] = number if math.isfinite(number) else None
            if record[name] is None:
                log.warning("%s is %s at step %d; written as null", name, number, step)
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Write what is buffered; nothing may be written after."""
        if not self._enabled:
            return
        self._file.close()
        self._events.close()


class Progress:
    """How far a run is: a live line on a terminal, else a log line every `log_every` steps."""

    def __init__(self, name: str, total: int, enabled: bool, start: int = 0, log_every: int = 10) -> None:
        """
        Args:
            name: of the run.
            total: steps of the run.
            enabled: True on rank 0 only.
            start: steps done before, when the run resumes.
            log_every: steps between log lines where stderr is no terminal.
        """
        self._name, self._total, self._start, self._log_every = name, total, start, log_every
        self._enabled = enabled
        self._shown: dict[str, float] = {}
        self._began = time.monotonic()
        self._bar: RichProgress | None = None
        if enabled and sys.stderr.isatty():
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(name, total=total, completed=start, state="")
            self._show(self._bar)

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Show that `step` is done.

        Args:
            metrics: of a logged step; loss and reward are shown until newer ones come.
        """
        if not self._enabled:
            return
        self._shown.update({key: float(metrics[key]) for key in SHOWN_METRICS if metrics and key in metrics})
        if self._bar is not None:
            self._bar.update(self._task, completed=step, state=self._state(step))
        elif step % self._log_every == 0 or step == self._total:
            log.info("%s  %d/%d  %s", self._name, step, self._total, self._state(step))

    def close(self) -> None:
        """Leave the last line standing."""
        if self._bar is not None:
            self._bar.stop()
            for handler in self._handlers:
                handler.setStream(sys.stderr)

    def _show(self, bar: RichProgress) -> None:
        """Start the live line, log lines above it: rich takes over sys.stderr, but handlers hold the old one."""
        stderr = sys.stderr
        bar.start()
        self._handlers = [
            handler
            for handler in logging.getLogger().handlers
            if isinstance(handler, logging.StreamHandler) and handler.stream is stderr
        ]
        for handler in self._handlers:
            handler.setStream(sys.stderr)

    def _state(self, step: int) -> str:
        """Metrics, speed since the start of this process, time left."""
        seconds_per_step = (time.monotonic() - self._began) / max(step - self._start, 1)
        left = timedelta(seconds=round((self._total - step) * seconds_per_step))
        # A step of the toy run takes milliseconds, one of a 14B run minutes.
        speed = f"{1 / seconds_per_step:.3g} steps/s" if seconds_per_step < 1 else f"{seconds_per_step:.3g} s/step"
        metrics = [f"{key} {value:.3g}" for key, value in self._shown.items()]
        return "  ".join([*metrics, speed, f"{left} left"])


def _drop_later_steps(path: Path, last_step: int) -> None:
    """Keep the lines up to a step; the old file stays until the new one is complete."""
    if not path.exists():
        return
    kept = [record for record in read_metrics(path) if record["step"] <= last_step]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
    partial.replace(path)
