"""A rehearsal from its config to its table."""

import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from afd_scale.config import ConfigError, RunConfig, one_line, resolved_yaml
from afd_scale.planning.gpus import Gpu
from afd_scale.planning.workload import workload
from afd_scale.rehearsal.checks import check_full_size, fewest_gpus, stops_too_late
from afd_scale.rehearsal.machine import Machine, adapt, not_rehearsed
from afd_scale.rehearsal.outcome import Outcome, all_well
from afd_scale.rehearsal.scorer import scorer
from afd_scale.rehearsal.shrink import Layout, shrink, small_layout
from afd_scale.rehearsal.stages import Place, not_reached, run_stages
from afd_scale.rehearsal.stand_ins import make_stand_ins

log = logging.getLogger(__name__)

CONFIG_NAME = "rehearsal.yaml"


@dataclass
class Rehearsal:
    """What was done and what came of it.

    Attributes:
        config: as it runs on the cluster.
        gpu: its kind there.
        full, small: layouts there and here.
        checks: of the run at its full size.
        stand_ins: what the small run reads, and for what.
        stages: of the small run.
        left_open: what could not be rehearsed.
        report: page of the small run; None where it has not come so far.
    """

    config: RunConfig
    gpu: str
    full: Layout
    small: Layout
    checks: list[Outcome] = field(default_factory=list)
    stand_ins: list[str] = field(default_factory=list)
    stages: list[Outcome] = field(default_factory=list)
    left_open: list[str] = field(default_factory=list)
    report: Path | None = None
    seconds: float = 0.0

    @property
    def went_well(self) -> bool:
        return all_well([*self.checks, *self.stages])

    def remove(self, folder: Path) -> None:
        """The small run, and what is said of where it is."""
        shutil.rmtree(folder)
        self.report = None
        self.stages = [replace(row, log=None) for row in self.stages]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = {name: [asdict(row) | {"log": row.log and str(row.log)} for row in getattr(self, name)]
                for name in ("checks", "stages")}  # fmt: skip
        return {"run": self.config.name, "ok": self.went_well, "ranks_there": asdict(self.full),
                "ranks_here": asdict(self.small), **rows, "stand_ins": self.stand_ins, "not_rehearsed": self.left_open,
                "report": self.report and str(self.report), "seconds": round(self.seconds, 1)}  # fmt: skip


def rehearse(
    config: RunConfig, *, root: Path, folder: Path, gpus: int | None, gpu: Gpu, ranks: int | None = None
) -> Rehearsal:
    """Look at a run at its full size, and do all of it in miniature.

    Args:
        root: of the source tree, whose entry points are called.
        folder: of the small run; all that is written is in it.
        gpus: of the cluster; None is the fewest that hold the run.
        gpu: their kind.
        ranks: here, at most; None is as many as the machine bears.
    Raises:
        ConfigError: no number of GPUs holds it.
    """
    began, machine = time.monotonic(), Machine.this_one()
    gpus = gpus or fewest_gpus(config, gpu)
    if gpus is None:
        raise ConfigError(f"config ({config.name}) must fit on some number of {gpu.name}: it fits on none as it is; "
                          "name one with --gpus to rehearse it all the same")  # fmt: skip
    full = _layout(config, gpus)
    small = small_layout(full, min(ranks or machine.ranks, full.ranks))
    done = Rehearsal(config, gpu.name, full, small)
    log.info("%s: looking at it at its full size", config.name)
    done.checks += check_full_size(config, gpus, gpu)
    done.left_open += not_rehearsed(config, machine, full, small)
    done.left_open += filter(None, [stops_too_late(config, gpus, gpu)])
    with scorer() as url:
        log.info("making stand-ins in %s", folder)
        done.stages += _in_miniature(done, machine, folder, url, root)
    if done.stages and all_well(done.stages):
        done.report = next((folder / "runs").glob("*/report.html"), None)
    done.seconds = time.monotonic() - began
    return done


def _layout(config: RunConfig, gpus: int) -> Layout:
    try:
        load = workload(config, gpus)
    except ConfigError:  # the plan says so too, and something is rehearsed all the same
        return Layout(max(1, gpus // config.parallel.sequence), config.parallel.sequence)
    return Layout(load.data_ranks, load.sequence)


def _in_miniature(done: Rehearsal, machine: Machine, folder: Path, scorer_url: str, root: Path) -> Iterator[Outcome]:
    began = time.monotonic()
    try:
        shrunk = adapt(shrink(done.config, done.full, done.small), machine)
        small, stand_ins = make_stand_ins(shrunk, done.config, folder / "stand_ins", scorer_url)
        (folder / CONFIG_NAME).write_text(resolved_yaml(small))
    except (ValueError, OSError) as error:
        yield Outcome("prepare", one_line(error), "failed", time.monotonic() - began)
        yield from not_reached()
        return
    done.stand_ins += [str(each) for each in stand_ins]
    said = f"{len(stand_ins)} stand-ins; {_sizes(small)}"
    yield Outcome("prepare", said, "ok", time.monotonic() - began)
    place = Place(root, folder / CONFIG_NAME, folder / "logs", folder / "made", done.small)
    yield from run_stages(small, place, lambda name: log.info("%s ...", name))


def _sizes(config: RunConfig) -> str:
    student, data = config.student, config.data
    return (f"student of {student.num_layers} layers, dim {student.dim}, {student.num_heads} heads; latents "
            f"{data.latent_frames} x {student.latent_channels} x {data.latent_height} x {data.latent_width}; "
            f"batch {data.global_batch}")  # fmt: skip


def table(done: Rehearsal) -> str:
    """For a terminal."""
    lines = [f"{done.config.name} for {done.full}, of {done.gpu}; rehearsed on {done.small}", "", "At its full size"]
    lines += _rows(done.checks)
    lines += ["", "In miniature, on this machine", *_rows(done.stages)]
    for row in (*done.checks, *done.stages):
        if row.status == "failed" and row.log is not None:
            lines += ["", f"{row.stage} failed; its log is {row.log}, and ends with", *(f"  {x}" for x in row.tail)]
    lines += ["", "Stand-ins", *(f"  {line}" for line in done.stand_ins)]
    lines += ["", "Not rehearsed", *(f"  {line}" for line in done.left_open)]
    if done.report is not None:
        lines += ["", f"Report of the small run: {done.report}"]
    failed = [row.stage for row in (*done.checks, *done.stages) if row.status == "failed"]
    verdict = f"failed: {', '.join(failed)}" if failed else "all went well"
    return "\n".join([*lines, "", f"{done.config.name}: {verdict} ({done.seconds:.0f} s)"])


def _rows(outcomes: Sequence[Outcome]) -> list[str]:
    width = max((len(row.stage) for row in outcomes), default=0)
    return [f"  {row.stage:{width}}  {row.status:11} {row.seconds:6.1f} s  {row.said}".rstrip() for row in outcomes]
