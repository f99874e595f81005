"""Save a whole run: every sharded network, the step and the position in the data.

Saving copies this rank's shards to host memory, for which training pauses, and writes them beside the training: every
rank its own, into a hidden partial folder. The main rank renames that when all ranks are done, so a folder
`step_XXXXXXXX` is complete by existing, and all of it is on the disk. Any number of ranks reads it. Whole weights are
put together from the shards by who needs them (`checkpoint.roles`). All of it is safetensors, but for optimizer states
on NVMe: DeepSpeed writes those its own way, while training waits.
"""

import json
import logging
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from afd_scale.checkpoint.adapters import BASE_NAME, Base, write_adapters
from afd_scale.checkpoint.checksums import note_of, noted_files, write_note
from afd_scale.checkpoint.weights import (
    CONFIG_NAME,
    FOLDER_NAME,
    MAX_SHARD_BYTES,
    STEM,
    complete_checkpoints,
    write_shards,
)
from afd_scale.config import ConfigError, RunConfig, one_line, resolved_yaml
from afd_scale.config.models import PolicyConfig
from afd_scale.engines.resharding import Shards
from afd_scale.files import sync, write_text
from afd_scale.protocols import Processes

log = logging.getLogger(__name__)

NETWORKS = "networks"  # folder of every role's shards, each below its name
STATE, CONFIG = "state.json", "config.yaml"
FORMAT = 4  # of a checkpoint
MOST_FAILURES = 3  # saves that fail one after the other, before the run ends
_POLL_SECONDS = 0.05
_LINGER_SECONDS = 10.0


class Checkpointed(Protocol):
    """A network that saves and loads this rank's part of it."""

    def snapshot(self, folder: Path) -> Shards:
        """This rank's part, copied to host memory; what only DeepSpeed can write is written to the folder at once."""

    def load(self, folder: Path) -> None: ...


class Agreeing(Processes, Protocol):
    """The ranks of a run, and what they agree by."""

    def largest(self, values: Sequence[float]) -> list[float]: ...


@dataclass(frozen=True)
class SavedStudent:
    """What a checkpoint says of the student that it is loaded as.

    Attributes:
        config: its `lora` is set where `gathered` are adapters.
        role: whose shards it is.
        base: of adapters.
        gathered: what is written as whole tensors, streamed on all ranks together: adapters, or the merged weights
            of a student whose base is nowhere else. None where the shards have it all.
    """

    config: PolicyConfig
    role: str
    base: Base | None = None
    gathered: Iterable[tuple[str, Tensor]] | None = None


class RunCheckpoints:
    """The checkpoints of one run folder. All methods but `due` and `metrics` are for all ranks together.

    Attributes:
        asked: the last step that was to be saved.
        saved: the newest that is.
        failures: saves that failed, one after the other.
    """

    def __init__(self, config: RunConfig, ranks: Agreeing):
        self.folder, self.config, self.ranks = config.folder / "checkpoints", config, ranks
        self.asked = self.saved = self.failures = 0
        self._write: _Write | None = None
        self._began = time.monotonic()
        self._pauses: list[float] = []
        self._written: list[float] = []

    def save(
        self, step: int, networks: Mapping[str, Checkpointed], data: Mapping[str, Any], student: SavedStudent,
        memory: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        """Begin to write the checkpoint of a finished step; one that is still being written is waited for.

        Args:
            networks: by role, each with this rank's part.
            data: position in the data, JSON-serialisable.
            memory: of the method.
        Raises:
            ConfigError: of the saves before, too many have failed.
        """
        self._began = time.monotonic()
        self.settle(wait=True)
        self.asked = step
        try:
            folder: Path = self.ranks.run_on_main(self._begin)
        except OSError as error:
            self._failed(error)
            return
        parts = {name: network.snapshot(folder / NETWORKS / name) for name, network in networks.items()}
        state = {"format": FORMAT, "step": step, "ranks": self.ranks.size, "exported": student.role, "data": dict(data),
                 "method": dict(memory or {})}  # fmt: skip
        gathered = _on_host(student.gathered, keep=self.ranks.is_main)
        write = partial(self._write_part, folder, parts)
        complete = partial(self._complete, folder, json.dumps(state, indent=1), student, gathered)
        pause = time.monotonic() - self._began
        self._pauses.append(pause)
        self._write = _Write(folder, write, complete if self.ranks.is_main else None, pause)

    def settle(self, wait: bool = False) -> None:
        """Learn how a checkpoint that is being written is coming along.

        Args:
            wait: until it is there, or has failed.
        Raises:
            ConfigError: too many have failed.
        """
        while self._write is not None:
            if wait:
                self._write.thread.join(_POLL_SECONDS)
            running, failed = self.ranks.largest([self._write.thread.is_alive(), self._write.error is not None])
            if failed:
                self._give_up(self._write)
            elif not running:
                self._settled(self._write)
            elif not wait:
                return

    def finish(self) -> None:
        """Wait until what was to be saved is.

        Raises:
            ConfigError: it could not be.
        """
        self.settle(wait=True)
        if self.failures:
            raise ConfigError(f"out ({self.folder}) must have room: step {self.asked} could not be saved; "
                              f"{self._standing}")  # fmt: skip

    def linger(self) -> None:
        """Let a save that is being written come to its end, for a while, where the ranks can no longer agree."""
        if self._write is not None:
            self._write.thread.join(_LINGER_SECONDS)

    def due(self) -> bool:
        """Whether so much time has gone by since the last save began; of this rank's clock."""
        minutes = self.config.train.save_minutes
        return minutes is not None and time.monotonic() - self._began >= 60 * minutes

    def metrics(self) -> dict[str, float]:
        """Of the saves since this was last asked: seconds, in the mean; and how many have failed in a row."""
        pairs = (("pause", self._pauses), ("write", self._written))
        values = {f"system/save_{name}_seconds": sum(seconds) / len(seconds) for name, seconds in pairs if seconds}
        self._pauses, self._written = [], []
        return values | ({"system/failed_saves": float(self.failures)} if self.failures else {})

    def load(self, state: Mapping[str, Any], networks: Mapping[str, Checkpointed]) -> None:
        """Restore every network from a checkpoint, by its state."""
        if self.ranks.is_main:
            self._point_to_newest()  # a run may have died between the checkpoint and its pointer
        for name, network in networks.items():
            network.load(state["folder"] / NETWORKS / name)
        self.asked = self.saved = state["step"]

    def _begin(self) -> Path:
        """Make the folder to write into; what killed runs left behind goes."""
        for pattern in (".step_*.partial", ".step_*.deleting"):
            for left_over in self.folder.glob(pattern):
                shutil.rmtree(left_over, ignore_errors=True)
        # A name of its own: ranks of an earlier start may live on for a while, and still write to theirs.
        folder = self.folder / f".{_name(self.asked)}.{uuid.uuid4().hex[:8]}.partial"
        (folder / NETWORKS).mkdir(parents=True)
        return folder

    def _write_part(self, folder: Path, parts: Mapping[str, Shards]) -> None:
        """This rank's shards, and where it is not the main one, its note of them."""
        rank, size = self.ranks.rank, self.ranks.size
        files = [shards.write(folder / NETWORKS / name, rank, size) for name, shards in parts.items()]
        if not self.ranks.is_main:
            write_note(folder, rank, files)

    def _complete(
        self, folder: Path, state: str, student: SavedStudent, gathered: Mapping[str, Tensor] | None,
        abandoned: threading.Event,
    ) -> None:  # fmt: skip
        """What the main rank writes of the whole, and when all ranks are done, its note of all that is no other's."""
        _write_student(folder / FOLDER_NAME, student, gathered)
        (folder / CONFIG).write_text(resolved_yaml(self.config))
        (folder / STATE).write_text(state)
        others = range(1, self.ranks.size)
        missing = list(others)
        while missing := [rank for rank in missing if not note_of(folder, rank).exists()]:
            if abandoned.wait(_POLL_SECONDS):
                return
        theirs = noted_files(folder, others)
        files = [path for path in folder.rglob("*") if path.is_file() and path not in theirs]
        # A base that was moved is told of by hand.
        no_note = {BASE_NAME, *(note_of(folder, rank).name for rank in others)}
        write_note(folder, 0, sorted(path for path in files if path.name not in no_note))
        for inner in (*sorted(path for path in folder.rglob("*") if path.is_dir()), folder):
            sync(inner)
        if (metrics := self.config.folder / "metrics.jsonl").exists():  # whose lines a saved step is not to outlive
            sync(metrics)
        complete = self.folder / _name(self.asked)
        remove_checkpoint(complete)
        folder.rename(complete)
        sync(self.folder)
        with suppress(OSError):  # it is saved; what is left is for tidiness
            self._point_to_newest()
            self._prune()

    def _prune(self) -> None:
        """Remove checkpoints that are neither among the newest nor of steps to keep."""
        settings = self.config.train
        for old in complete_checkpoints(self.folder)[: -settings.keep_checkpoints]:
            if settings.keep_every is None or int(old.name.removeprefix("step_")) % settings.keep_every:
                remove_checkpoint(old)

    def _point_to_newest(self) -> None:
        """`latest` names the newest checkpoint, for people and scripts; nothing of ours relies on it."""
        write_text(self.folder / "latest", complete_checkpoints(self.folder)[-1].name)

    def _settled(self, write: "_Write") -> None:
        self._write, self.saved, self.failures = None, self.asked, 0
        self._written.append(write.seconds)
        log.info("saved %s: training paused for %.2g s, it was written in %.2g s", self.folder / _name(self.saved),
                 write.pause, write.seconds)  # fmt: skip

    def _give_up(self, write: "_Write") -> None:
        """Some rank could not write its part: remove it all."""
        write.abandoned.set()
        write.thread.join()
        self._write = None
        try:
            self.ranks.run_on_all(write.raise_error)  # the first rank's, on all
        except OSError as error:
            if self.ranks.is_main:
                shutil.rmtree(write.folder, ignore_errors=True)
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        self.failures += 1
        reason = error.strerror or one_line(error)
        if self.failures >= MOST_FAILURES:
            raise ConfigError(f"out ({self.folder}) must have room: {self.failures} saves in a row have failed, the "
                              f"last of step {self.asked} ({reason}); {self._standing}")  # fmt: skip
        if self.ranks.is_main:
            log.warning("step %d could not be saved (%s): the run goes on; %s", self.asked, reason, self._standing)

    @property
    def _standing(self) -> str:
        return f"step {self.saved} is the newest checkpoint" if self.saved else "there is no checkpoint yet"


class _Write:
    """One rank's part of a checkpoint on its way to the disk, in a thread of its own, without collectives.

    Args:
        folder: that all ranks write into.
        part: writes this rank's files.
        complete: on the main rank, does the rest; it returns early once `abandoned` is set.
        pause: seconds that training stood still for it.
    """

    def __init__(
        self, folder: Path, part: Callable[[], None], complete: Callable[[threading.Event], None] | None, pause: float
    ):
        self.folder, self.abandoned, self.pause, self.seconds = folder, threading.Event(), pause, 0.0
        self.error: Exception | None = None
        self._part, self._complete = part, complete
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        began = time.monotonic()
        try:
            self._part()
            if self._complete is not None:
                self._complete(self.abandoned)
        except Exception as error:  # the ranks hear of it when they next agree
            self.error = error
        self.seconds = time.monotonic() - began

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint so that no half of it ever passes for complete."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.deleting")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _write_student(folder: Path, student: SavedStudent, gathered: Mapping[str, Tensor] | None) -> None:
    """`student/`: what it is, and what the shards do not have of it."""
    if gathered is not None and student.base is not None:
        write_adapters(gathered, folder, student.config, student.base)
        return
    folder.mkdir()
    (folder / CONFIG_NAME).write_text(student.config.model_dump_json(indent=2))
    if gathered is not None:
        write_shards(gathered.items(), folder, STEM, MAX_SHARD_BYTES)


def _on_host(weights: Iterable[tuple[str, Tensor]] | None, keep: bool) -> dict[str, Tensor] | None:
    """Streamed tensors in host memory, where they are kept; gathering one takes all ranks."""
    if weights is None:
        return None
    copies = {}
    for name, weight in weights:
        if keep:
            copies[name] = weight.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return copies


def _name(step: int) -> str:
    return f"step_{step:08d}"
