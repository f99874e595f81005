"""What a run says of itself while it trains: metrics.jsonl, what its trackers get, a progress line."""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from afd_scale.evaluation.report import read_metrics
from afd_scale.files import write_text
from afd_scale.progress import progress
from afd_scale.training.trackers import Tracker, tell

log = logging.getLogger(__name__)

SHOWN_METRICS = ("student/loss", "rollout/reward_mean", "discriminator/accuracy", "system/step_seconds")


@contextmanager
def recording(
    name: str, folder: Path, steps: range, trackers: list[Tracker], *, is_main: bool
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Record the logged steps of a run, on its main rank; what an earlier attempt wrote of these steps is dropped.

    Args:
        name, folder: of the run.
        steps: that are to be done, to the last of the run.
    Yields:
        Takes a step that is done, and its metrics; a value that is not finite is written as null, with a warning.
    """
    if not is_main:
        yield lambda step, metrics: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "metrics.jsonl"
    _drop_later_steps(lines, steps.start - 1)
    zero = min(steps.start - 1, 0)  # a warm-up's steps are numbered up to 0
    with (
        lines.open("a", buffering=1) as file,
        progress(name, begun=steps.start - 1 - zero, say=log.info) as show,
    ):

        def record(step: int, metrics: Mapping[str, float]) -> None:
            line: dict[str, float | None] = {"step": step}
            tell(trackers, lambda tracker: tracker.metrics(step, metrics))
            for key, value in metrics.items():
                line[key] = value if math.isfinite(value) else None
                if line[key] is None:
                    log.warning("%s is %s at step %d; written as null", key, value, step)
            file.write(json.dumps(line) + "\n")
            shown = [f"{key} {metrics[key]:.3g}" for key in SHOWN_METRICS if key in metrics]
            show(step - zero, steps.stop - 1 - zero, "  ".join(shown))

        yield record


def _drop_later_steps(path: Path, last_step: int) -> None:
    """Keep the lines up to a step; the old file stays until the new one is complete."""
    if not path.exists():
        return
    kept = [record for record in read_metrics(path) if record["step"] <= last_step]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
