"""The runs of a study, done: so many at a time, each a process of its own, shared with who else works in the folder.

A run is claimed by a lock on a file, of which the system lets go with the process. Where a file system has no locks a
second start is refused by the run itself, and looked at again later.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from types import FrameType, MappingProxyType

from filelock import FileLock

from afd_scale.config import one_line
from afd_scale.data.check import ensure_dataset, is_to_be_made
from afd_scale.files import system_errors, try_lock, write_text
from afd_scale.progress import progress
from afd_scale.study.plan import Plan, Trial
from afd_scale.study.results import Record
from afd_scale.study.runs import Command, Place, check_known, read_record
from afd_scale.training.owner import ONE_JOB

CLAIMS, FAILED = ".claims", ".failed"
STOPPED = 3  # exit code of a run that was told to stop and has saved
# What would make a run one rank of several, where the study itself was started by srun or mpirun.
_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_STEP_", "OMPI_COMM_WORLD_")
NONE_KNOWN: Mapping[str, Record] = MappingProxyType({})
_POLL_SECONDS = 0.2
_REFUSED_SECONDS = 30.0  # until a run that another job does is tried again: each try starts Python
_TAIL_BYTES = 4096


class StoppedError(Exception):
    """The study was told to stop; its runs have saved."""


@dataclass(frozen=True)
class _Running:
    trial: Trial
    process: subprocess.Popen[bytes]
    claim: int


class Outcomes:
    """What runs have left so far, in the folder that all who work on a study share.

    Args:
        known: of runs that were done elsewhere, by name.
        again: failures of earlier starts count as not yet done.
    Attributes:
        records: of complete runs, by name.
    """

    def __init__(self, plan: Plan, place: Place, known: Mapping[str, Record] = NONE_KNOWN, again: bool = False):
        self.plan, self.place, self._known = plan, place, known
        self.records: dict[str, Record] = {}
        self._before = self._marks() if again else {}
        self.failed: dict[str, str] = {}

    def look(self) -> None:
        """Read what has come since.

        Raises:
            ConfigError: a run has other settings than the study.
        """
        self.failed = {
            name: why for name, (written, why) in self._marks().items() if self._before.get(name) != (written, why)
        }  # fmt: skip
        while True:
            new = {trial.name: record for trial in self.trials() if trial.name not in self.records
                   if (record := self._read(trial)) is not None}  # fmt: skip
            self.records |= new
            for name in new:
                self.failed.pop(name, None)
            if not new:  # a choice may have brought more
                return

    def _read(self, trial: Trial) -> Record | None:
        known = self._known.get(trial.name)
        if known is None:
            return read_record(trial, self.place)
        check_known(known, trial, self.place)
        return known

    def trials(self) -> list[Trial]:
        return self.plan.trials(self.records, self.failed)

    def left(self) -> list[Trial]:
        """Neither complete nor failed."""
        ended = self.records.keys() | self.failed.keys()
        return [trial for trial in self.trials() if trial.name not in ended]

    def fail(self, trial: Trial, line: str) -> None:
        write_text(self.place.out / f"{trial.name}{FAILED}", line + "\n")

    def begin(self, trial: Trial) -> None:
        (self.place.out / f"{trial.name}{FAILED}").unlink(missing_ok=True)

    def _marks(self) -> dict[str, tuple[int, str]]:
        """When they were written and what they say, by name of the run."""
        marks = {}
        for path in self.place.out.glob(f"*{FAILED}"):
            with suppress(FileNotFoundError):  # its run has begun again
                marks[path.name.removesuffix(FAILED)] = path.stat().st_mtime_ns, path.read_text().strip()
        return marks


def work(
    plan: Plan,
    place: Place,
    jobs: int,
    command: Command | None = None,
    look_seconds: float = 5.0,
    known: Mapping[str, Record] = NONE_KNOWN,
) -> Outcomes:
    """Do what is left of a study, until nothing is; runs of others are waited for.

    Args:
        jobs: runs at a time.
        command: that does a run; None is the ordinary one.
        look_seconds: between two looks at what others do.
        known: of runs that were done elsewhere, by name.
    Raises:
        ConfigError: the folder holds runs of other settings.
        StoppedError: SIGTERM or SIGINT came; the runs were told, and have ended.
    """
    with system_errors(f"out ({place.out}) must be a folder that can be written to"):
        (place.out / CLAIMS).mkdir(parents=True, exist_ok=True)
    outcomes = Outcomes(plan, place, known, again=True)
    outcomes.look()
    with _told_to_stop() as told, progress("runs of the study", begun=len(outcomes.records)) as show:
        _Worker(outcomes, jobs, command or place.command, told).run(look_seconds, show)
    return outcomes


class _Worker:
    """This process's share."""

    def __init__(self, outcomes: Outcomes, jobs: int, command: Command, told: Event):
        self.outcomes, self.place = outcomes, outcomes.place
        self.jobs, self.command, self.told = jobs, command, told
        self.running: list[_Running] = []
        self.later: dict[str, float] = {}  # when runs of others are to be tried again

    def run(self, look_seconds: float, show: Callable[..., None]) -> None:
        last_look = time.monotonic()
        try:
            while not self.told.is_set():
                self._start()
                if not self.running and not self.outcomes.left():
                    return
                self.told.wait(_POLL_SECONDS)
                ended = self._ended()
                if ended or time.monotonic() - last_look >= look_seconds:
                    self.outcomes.look()
                    last_look = time.monotonic()
                for line in ended:
                    done = len(self.outcomes.records) + len(self.outcomes.failed)
                    show(done, len(self.outcomes.trials()), line)
            raise StoppedError(f"the study was told to stop; {len(self.running)} runs were told, and save")
        finally:
            self._stop()

    def _start(self) -> None:
        """As many as there is room for, the first ones first."""
        mine = {run.trial.name for run in self.running}
        for trial in self.outcomes.left():
            if len(self.running) >= self.jobs or self.told.is_set():
                return
            if trial.name in mine or self.later.get(trial.name, 0) > time.monotonic() or not self._is_ready(trial):
                continue
            claim = try_lock(self.place.out / CLAIMS / trial.name)
            if claim is None:
                continue
            if read_record(trial, self.place) is not None or self._has_failed_since(trial):
                os.close(claim)
                continue
            self._make_data(trial)
            self.running.append(_Running(trial, self._process(trial), claim))

    def _is_ready(self, trial: Trial) -> bool:
        if trial.source is None or trial.source.name in self.outcomes.records:
            return True
        if trial.source.name in self.outcomes.failed:
            self.outcomes.fail(trial, f"the run whose student it measures, {trial.source.name}, failed")
        return False

    def _has_failed_since(self, trial: Trial) -> bool:
        self.outcomes.look()
        return trial.name in self.outcomes.failed

    def _make_data(self, trial: Trial) -> None:
        """Runs that begin together would all make it."""
        data = trial.run_config(self.place.out).data
        if data.source is None:
            return
        data = data.model_copy(update={"shards": str(self.place.root / data.shards)})
        if is_to_be_made(data):
            with FileLock(self.place.out / CLAIMS / ".data"):
                ensure_dataset(data)

    def _process(self, trial: Trial) -> subprocess.Popen[bytes]:
        self.outcomes.begin(trial)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_LAUNCHERS)}
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // self.jobs))
        with self.place.log(trial).open("ab") as log:
            # A session of its own: Ctrl-C reaches the study alone, which tells the runs to stop as they understand it.
            return subprocess.Popen(self.command(trial), cwd=self.place.root, env=environment, stdin=subprocess.DEVNULL,
                                    stdout=log, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip

    def _ended(self) -> list[str]:
        """A line for each run that has ended."""
        lines = []
        for run in list(self.running):
            code = run.process.poll()
            if code is None:
                continue
            self.running.remove(run)
            line = self._judge(run.trial, code)
            os.close(run.claim)
            lines.append(line)
        return lines

    def _judge(self, trial: Trial, code: int) -> str:
        if code == 0 and read_record(trial, self.place) is not None:
            return trial.name
        last = _last_line(self.place.log(trial))
        if ONE_JOB in last:  # by a process that no claim told of
            self.later[trial.name] = time.monotonic() + _REFUSED_SECONDS
            return f"{trial.name} is another job's"
        reason = "it left no result" if code == 0 else f"exit code {code}"
        self.outcomes.fail(trial, f"{reason}: {last}")
        return f"{trial.name} failed, {reason}: {last}"

    def _stop(self) -> None:
        """Tell all that run, and wait: what they save is not lost."""
        for run in self.running:
            run.process.terminate()
        for run in self.running:
            run.process.wait()
            os.close(run.claim)


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return one_line(lines[-1]) if lines else "it said nothing"


@contextmanager
def _told_to_stop() -> Iterator[Event]:
    """Set by SIGTERM and SIGINT while the block lasts."""
    told = Event()

    def tell(number: int, frame: FrameType | None) -> None:
        told.set()

    before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
