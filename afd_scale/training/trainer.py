"""The life of a run: prepare, build, resume, step, log, save, evaluate, report. What a step does is the method's."""

import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from afd_scale.checkpoint.adapters import check_base
from afd_scale.checkpoint.resume import newest_whole_checkpoint
from afd_scale.checkpoint.run_state import Checkpointed, RunCheckpoints, SavedStudent
from afd_scale.checkpoint.weights import FOLDER_NAME
from afd_scale.config import ConfigError, RunConfig, load_config
from afd_scale.config.judges import JudgeConfig
from afd_scale.config.models import PolicyConfig
from afd_scale.data.check import check_copies, ensure_dataset, hash_share
from afd_scale.data.reader import Ahead, TeacherStream
from afd_scale.evaluation.report import metric_table, write_report
from afd_scale.evaluation.run_files import SUMMARY
from afd_scale.files import full_disk_explained, write_text
from afd_scale.health.nvml import gpu_meter
from afd_scale.parallel.heartbeats import Heart, living
from afd_scale.parallel.ranks import Ranks
from afd_scale.planning.spent import Spent
from afd_scale.planning.workload import workload
from afd_scale.protocols import Metrics
from afd_scale.training.build import Run, base_of, build_codec, build_run
from afd_scale.training.diagnostics import Diagnostics
from afd_scale.training.evaluator import Comparison, Evaluator
from afd_scale.training.guards import Guard
from afd_scale.training.inputs import check_early, check_inputs, complete_summary, input_errors
from afd_scale.training.metrics import Recorder, recording
from afd_scale.training.owner import Owner
from afd_scale.training.preemption import GivenUpError, Preempted, StopRequest, ending_at_once, noting
from afd_scale.training.run_folder import write_config
from afd_scale.training.steps import StepWatch
from afd_scale.training.trackers import Tracker, open_tracker, tell
from afd_scale.types import Batch, JudgeError, UnreachableJudgeError

log = logging.getLogger(__name__)


class _WentBackError(Exception):
    """The steps go on from an earlier one."""


def train(config: RunConfig, ranks: Ranks, requirers: tuple[Path, ...] = ()) -> None:
    """Bring a run, and the one it requires, to completion; a complete run is left as it is.

    Raises:
        ConfigError: the config, the data, the start weights or the run folder cannot be used.
        Preempted: the run was told to stop, or could not reach a judge, and has saved what there was to save.
        LostRanksError: other ranks are gone; it says which, as far as this one can tell.
    """
    workload(config, ranks.size)  # refuses ranks and batches that do not divide
    sharing = ranks.sharing_videos(config.parallel.sequence, config.engine.timeout_minutes)
    ranks.run_on_main(check_early, config, sharing, requirers)
    if config.requires is not None:
        log.info("%s requires the run of %s", config.name, config.requires)
        train(load_config(config.requires), ranks, (*requirers, config.requires))
    summary = ranks.run_on_main(complete_summary, config)
    if summary is not None:
        table = "" if requirers else "\n" + metric_table(summary)
        log.info("%s is complete: %s%s", config.name, config.folder / "report.html", table)
        return
    owner = Owner(config.folder)
    ranks.run_on_main(owner.take)
    try:
        with (
            living(config.folder, ranks.rank, ranks.size, ranks.of_machine) as heart,
            ending_at_once(f"{config.name} was told to stop, with nothing to save", ranks),
        ):
            Trainer(config, sharing, heart).run()
    finally:
        if ranks.is_main:
            owner.leave()


class Trainer:
    """One run.

    Args:
        heart: is told the phases.
    """

    def __init__(self, config: RunConfig, ranks: Ranks, heart: Heart):
        self.config, self.ranks, self.heart = config, ranks, heart
        self.seconds: defaultdict[str, float] = defaultdict(float)  # by phase
        self.inner_seconds = 0.0  # of the phases within the present one
        self.read_gpu = gpu_meter(ranks.device)
        self.trackers: list[Tracker] = []  # on the main rank, while the run lasts
        with self._phase("prepare"), input_errors():
            ranks.run_on_main(ensure_dataset, config.data)
            while ranks.any(not ranks.run_on_all(hash_share, config, ranks.rank, ranks.size)):
                continue
            facts = ranks.run_on_main(check_inputs, config)
            ranks.run_on_each_machine(check_copies, config)
            self.stream = Ahead(TeacherStream(config), pinned=ranks.device.type == "cuda")
            self.built: Run = build_run(config, ranks)
            self.base = ranks.run_on_main(base_of, config)
            self.checkpoints = RunCheckpoints(config, ranks)
            codec = build_codec(config.codec, facts.codec, ranks.device)
            self.decode = None if codec is None else codec.decode
            self.evaluator = Evaluator(config, ranks, codec)
            self.evaluator.check()
            self.spent = Spent(config, ranks.size, self.built.method.warmup_steps)
            self.diagnostics = None
            if config.train.diagnose_every is not None:
                self.diagnostics = Diagnostics(config, self.built, self.evaluator)
            ranks.run_on_main(write_config, config, ranks.size)  # from here on there is a run
        self.stop = StopRequest(ranks)
        self.guard = Guard(config.train.most_skipped_steps)
        self.watch = StepWatch(self.stop, self.built.networks, "student", self.built.method.memory)
        for engine in self.built.engines.values():
            engine.watch = self.watch
        self.step, self.position = 0, self.stream.state_dict()  # the last one finished, and where in the data it ended
        self.metrics: Metrics = {}  # of that step

    def run(self) -> None:
        if self.config.student.weights is not None:
            with self._phase("evaluate"):
                if self.evaluator.keep_base(self.built.exported) and self._has_learning_judge:
                    self.evaluator.warn_of_shortcuts()
        if self.diagnostics is not None:
            with self._phase("diagnose"):
                self.diagnostics.begin()
        with self._phase("prepare"), input_errors():
            self._resume()
        first = self.step + 1 if self.step else 1 - self.built.method.warmup_steps
        self.ranks.run_on_main(self._open_trackers, first)
        try:
            comparison = self._steps_and_comparison(first)
        except (ConfigError, Preempted):  # of all ranks alike
            self.checkpoints.settle(wait=True)
            raise
        except Exception:
            self.checkpoints.linger()
            raise
        finally:
            tell(self.trackers, lambda tracker: tracker.close())
        self.ranks.run_on_main(self._finish, comparison)
        self.stream.close()
        self.ranks.barrier()

    @property
    def _has_learning_judge(self) -> bool:
        return any(isinstance(role.network, JudgeConfig) and role.optimizer for role in self.config.cast)

    def _steps_and_comparison(self, first: int) -> Comparison:
        with self._may_be_stopped():
            if first < 1:
                with self._phase("warm_up"):
                    self._train(first, 0)
            if self.step < self.config.train.steps:
                with self._phase("train"):
                    while self.step < self.config.train.steps:
                        with suppress(_WentBackError):
                            self._train(self.step + 1, self.config.train.steps)
                self.guard.end(self.step, self.watch.skipped)
                with self._phase("save"):
                    self._save()
                    self.checkpoints.finish()
                if self.stop.agreed():
                    raise GivenUpError
        with self._phase("evaluate"):
            comparison = self.evaluator.compare(self.built.exported)
            self._show()
        return comparison

    def _open_trackers(self, first: int) -> None:
        for name in self.config.train.trackers:
            self.trackers.append(open_tracker(name, self.config, first))

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Add up the seconds that this process spends in a phase; what it spends in one within is that one's."""
        outer, self.inner_seconds = self.inner_seconds, 0.0
        outer_phase, began = self.heart.phase, time.monotonic()
        self.heart.at(name)
        yield
        self.heart.at(outer_phase)
        seconds = time.monotonic() - began
        self.seconds[name] += seconds - self.inner_seconds
        self.inner_seconds = outer + seconds

    def _clock(self) -> float:
        """Seconds, those in phases within the present one not counted."""
        return time.monotonic() - self.inner_seconds

    def _resume(self) -> None:
        """Go on from the newest complete checkpoint, where there is one."""
        checkpoint = newest_whole_checkpoint(self.checkpoints.folder, self.ranks)
        if checkpoint is None:
            return
        if self.base is not None:
            self.ranks.run_on_main(check_base, checkpoint["folder"] / FOLDER_NAME, self.base)
        log.info("%s resumes after step %d from %s", self.config.name, checkpoint["step"], checkpoint["folder"])
        self._load(checkpoint)
        self.stream.load_state_dict(checkpoint["data"])
        self.position = checkpoint["data"]

    def _load(self, checkpoint: Mapping[str, Any]) -> None:
        """All but the position in the data."""
        # What does not fit is perhaps a file that one rank alone reads.
        self.ranks.run_on_all(self.checkpoints.load, checkpoint, self.built.networks)
        self.built.method.memory.clear()
        for name, value in checkpoint["method"].items():
            self.built.method.memory[name] = torch.tensor(value)
        self.step = checkpoint["step"]

    def _go_back(self) -> None:
        """To the newest checkpoint; the data goes on.

        Raises:
            ConfigError: there is none, or going back did not help.
        """
        self.checkpoints.settle(wait=True)
        self.guard.go_back(self.step, self.checkpoints.saved, self.watch.skipped)
        checkpoint = newest_whole_checkpoint(self.checkpoints.folder, self.ranks)
        assert checkpoint is not None, "it was saved, or loaded, by this process"
        self._load(checkpoint)

    def _train(self, first: int, last: int) -> None:
        """Steps of the method; those below 1 are its warm-up, which leaves metrics and no checkpoint."""
        config, steps = self.config, range(first, last + 1)
        name = config.name if first > 0 else f"{config.name}, warm-up"
        with recording(
            name, config.folder, steps, self.trackers, self.evaluator.suite_metrics, is_main=self.ranks.is_main
        ) as record:
            if first > 1 and (alarm := self._stopping_alarm(record)):
                raise ConfigError(f"train.stop_on_alarm ({', '.join(config.train.stop_on_alarm)}) must leave out an "
                                  f"alarm that is on where the run goes on, at step {self.step}: {alarm}")  # fmt: skip
            last_log, last_time, counter = first - 1, self._clock(), self.built.counter
            counter.bytes, self.stream.waited_seconds = 0, 0.0
            for step in steps:
                self._run_step(step)
                if self.guard.see(step, self.watch.skipped):
                    self._go_back()
                    raise _WentBackError
                looks = self.diagnostics is not None and step >= 0 and self._is_due(config.train.diagnose_every)
                if looks or self._is_due(config.train.log_every) or step == last:
                    values = self._reduce(self.metrics)  # waits for the device: the time is that of finished steps
                    self._check_finite(values)
                    values |= {"system/skipped_steps": float(self.guard.left_out)} if self.guard.left_out else {}
                    seconds = self._clock() - last_time
                    values["system/step_seconds"] = seconds / (step - last_log)
                    values["system/data_wait_share"] = self.stream.waited_seconds / seconds
                    values["system/gathered_gib"] = counter.bytes / 2**30 / (step - last_log)
                    last_log, last_time = step, self._clock()
                    counter.bytes, self.stream.waited_seconds = 0, 0.0
                    values |= self.checkpoints.metrics()
                    values["compute/pflop"] = self.spent.pflop(step)
                    values |= self.read_gpu()
                    try:
                        values |= self._diagnosis() if looks else {}
                    finally:  # a step that is done is recorded, also where a judge fails behind it
                        record(step, values)
                self.checkpoints.settle()
                if self.stop.agreed():
                    raise GivenUpError
                if step < 1 or step == last:
                    continue
                alarm = self._stopping_alarm(record)
                if alarm or self._is_due(config.train.save_every) or self._is_time_to_save():
                    self._check_and_save()
                if alarm:
                    self.checkpoints.finish()
                if alarm:
                    raise ConfigError(f"train.stop_on_alarm ended the run, which has saved step {step}: {alarm}")
                if self._is_due(config.train.sample_every):
                    with self._phase("sample"):
                        self.evaluator.sample(self.built.exported, step)
                        self._show()

    def _run_step(self, step: int) -> None:
        """One step of the method."""
        self.heart.at(f"step {step}")
        with self._judges_may_fail(), self.watch.step(kept=step >= 1):
            self.metrics = self.built.method.train_step(self._next_batch(), step)
        self.step, self.position = step, self.stream.state_dict()

    @contextmanager
    def _may_be_stopped(self) -> Iterator[None]:
        """Being told to stop ends the run where its last step ended.

        Raises:
            Preempted: it was.
        """
        with noting(self.stop):
            try:
                yield
            except GivenUpError:
                if self.step < 1:
                    line = f"{self.config.name} was told to stop in its warm-up; start it again to begin anew"
                    raise Preempted(line) from None
                self._save_last_step()
                line = f"{self.config.name} was told to stop and saved step {self.checkpoints.saved}"
                raise Preempted(f"{line}; start it again to go on") from None

    @contextmanager
    def _judges_may_fail(self) -> Iterator[None]:
        """A judge that does ends the run where its last step ended.

        Raises:
            Preempted: a judge could not be reached in time.
            ConfigError: one answered what is no score.
        """
        try:
            yield
        except JudgeError as error:
            self._save_last_step()
            kept = f"step {self.checkpoints.saved} is saved" if self.checkpoints.saved else "no step is finished"
            line = f"{self.config.name} ends, {kept}: {error}"
            if isinstance(error, UnreachableJudgeError):
                raise Preempted(f"{line}; start it again to go on") from error
            raise ConfigError(line) from error

    def _save_last_step(self) -> None:
        """All as it was when the last step was finished, whatever one that was given up has changed."""
        networks = self.watch.given_up()
        if self.step > self.checkpoints.asked:
            self._check_and_save(networks)
        self.checkpoints.finish()

    def _check_and_save(self, networks: Mapping[str, Checkpointed] | None = None) -> None:
        if self.guard.in_a_row:  # nobody knows whether the weights are good
            return
        self._check_finite(self._reduce(self.metrics))
        with self._phase("save"):
            self._save(networks)

    def _is_time_to_save(self) -> bool:
        """By the main rank's clock."""
        return self.config.train.save_minutes is not None and self.ranks.any(
            self.ranks.is_main and self.checkpoints.due()
        )

    def _stopping_alarm(self, record: Recorder) -> str | None:
        """Of the alarms that are on, one that ends the run, with what there is to say of it."""
        names = self.config.train.stop_on_alarm
        found = [f"{name}: {record.standing[name]}" for name in names if name in record.standing]
        alarm: str | None = self.ranks.broadcast(found[0] if found else None) if names else None
        return alarm

    def _diagnosis(self) -> dict[str, float]:
        assert self.diagnostics is not None, "who looks has one"
        with self._phase("diagnose"), self._judges_may_fail():
            return self.diagnostics.look()

    def _show(self) -> None:
        """Hand the present step's sample videos to the trackers."""
        files = sorted(self.evaluator.folder(self.step).glob("*.mp4"))
        tell(self.trackers, lambda tracker: tracker.videos(self.step, files))

    def _check_finite(self, values: dict[str, float]) -> None:
        """A diverged run ends here: its weights must not push good checkpoints out."""
        if self.guard.in_a_row:  # that is the guard's
            return
        for name, value in values.items():
            if not math.isfinite(value):
                raise ConfigError(f"{name} ({value}) must be finite at step {self.step}: the run diverged, and earlier "
                                  "checkpoints stand; lower the learning rate")  # fmt: skip

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _next_batch(self) -> Batch:
        batch = next(self.stream).to(self.ranks.device)
        return replace(batch, teacher=replace(batch.teacher, decode=self.decode))

    def _reduce(self, metrics: Metrics) -> dict[str, float]:
        """Means over the ranks, in one collective."""
        names = sorted(metrics)
        values = torch.stack([metrics[name].float().to(self.ranks.device) for name in names])
        return dict(zip(names, self.ranks.mean(values).tolist(), strict=True))

    def _save(self, networks: Mapping[str, Checkpointed] | None = None) -> None:
        """Begin to.

        Args:
            networks: by role; None takes all as they are.
        """
        config, exported = self.config, self.built.exported
        student, gathered = config.student, None
        if self.base is not None:
            gathered = exported.adapter_weights()
        elif student.lora is not None:  # over a random start, which is nowhere else: the adapters are merged
            student, gathered = student.model_copy(update={"lora": None}), exported.full_weights()
        policy = PolicyConfig(student=student, sampler=config.sampler)
        saved = SavedStudent(policy, config.method.exported, self.base, gathered)
        self.checkpoints.save(self.step, networks or self.built.networks, self.position, saved, self._memory())

    def _memory(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.built.method.memory.items()}

    def _finish(self, comparison: Comparison) -> None:
        """summary.json says that the run is complete, so it is the last file but the report that reads it."""
        summary = {
            "method": self.config.method.name,
            "steps": self.step,
            "ranks": self.ranks.size,
            "suite": self.config.evaluation.metrics,
            **comparison.summary,
            "seconds": {name: round(seconds, 2) for name, seconds in self.seconds.items()},
        }
        with full_disk_explained(self.config.out, "out"):
            write_text(self.config.folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
            report = write_report(self.config.folder)
        if comparison.metrics:
            log.info("%s\n%s", self.config.name, metric_table(summary))
        log.info("%s is complete; look at %s", self.config.name, report)
