"""What a run says of itself while it trains: metrics.jsonl, tensorboard events, a progress line."""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from afd_scale.evaluation.report import read_metrics
from afd_scale.files import write_text
from afd_scale.progress import progress

log = logging.getLogger(__name__)

SHOWN_METRICS = ("student/loss", "rollout/reward_mean", "discriminator/accuracy", "system/step_seconds")


@contextmanager
def recording(
    name: str, folder: Path, steps: range, *, is_main: bool
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Record the logged steps of a run, on its main rank.

    Args:
        name: of the run.
        folder: of the run.
        steps: that are to be done, to the last of the run.
    Yields:
        Takes a step that is done, and its metrics.
    """
    if not is_main:
        yield lambda step, metrics: None
        return
    done, zero = steps.start - 1, min(steps.start - 1, 0)  # a warm-up's steps are numbered up to 0
    with closing(MetricsWriter(folder, done)) as writer, progress(name, begun=done - zero, say=log.info) as show:

        def record(step: int, metrics: Mapping[str, float]) -> None:
            writer.write(step, metrics)
            shown = [f"{key} {metrics[key]:.3g}" for key in SHOWN_METRICS if key in metrics]
            show(step - zero, steps.stop - 1 - zero, "  ".join(shown))

        yield record


class MetricsWriter:
    """Appends to `<folder>/metrics.jsonl` and to tensorboard events in `<folder>/tensorboard`."""

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        """
        Args:
            folder: of the run; made when absent.
            resume_step: last step that counts; what an earlier attempt wrote of later steps is dropped.
        """
        # Loads slowly, and only one rank needs it.
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        _drop_later_steps(path, resume_step)
        self._file = path.open("a", buffering=1)
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step's metrics; a value that is not finite becomes null, with a warning."""
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
        self._file.close()
        self._events.close()


def _drop_later_steps(path: Path, last_step: int) -> None:
    """Keep the lines up to a step; the old file stays until the new one is complete."""
    if not path.exists():
        return
    kept = [record for record in read_metrics(path) if record["step"] <= last_step]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
