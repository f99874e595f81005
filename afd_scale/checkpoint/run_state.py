"""Save and resume a whole run: every sharded network, the step and the position in the data.

A checkpoint is written to a hidden partial folder and renamed when all ranks are done, so a folder `step_XXXXXXXX` is
complete by existing. Every rank writes its shards of every network; any number of ranks reads them. What others load
(`student/`) is whole: all weights, or adapters and where their base is. All of it is safetensors, but for optimizer
states on NVMe, which DeepSpeed writes its own way.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from afd_scale.checkpoint.adapters import Base, save_adapters
from afd_scale.checkpoint.weights import FOLDER_NAME, complete_checkpoints, save_weights
from afd_scale.config import ConfigError
from afd_scale.config.models import PolicyConfig
from afd_scale.files import write_text

log = logging.getLogger(__name__)

NETWORKS = "networks"  # folder of every role's shards, each below its name
FORMAT = 3  # of a checkpoint


class Checkpointed(Protocol):
    """A network that saves and loads this rank's part of it."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class RunCheckpoints:
    """The checkpoints of one run folder.

    Args:
        folder: `<run>/checkpoints`.
        is_main, size, barrier: of the ranks.
        keep: newest complete checkpoints that stay.
    """

    def __init__(self, folder: Path, *, is_main: bool, size: int, barrier: Callable[[], None], keep: int):
        self.folder, self.is_main, self.size, self.barrier, self.keep = folder, is_main, size, barrier, keep

    def save(
        self, step: int, networks: Mapping[str, Checkpointed], data: Mapping[str, Any],
        weights: Iterable[tuple[str, Tensor]], student: PolicyConfig, base: Base | None = None,
        memory: Mapping[str, float] | None = None,
    ) -> Path:  # fmt: skip
        """Write the checkpoint of a finished step; on all ranks together.

        Args:
            networks: by role, each with this rank's part.
            data: position in the data, JSON-serialisable.
            weights: the student's whole weights, or its adapters, streamed; written as safetensors by the main rank.
            student: what they are of; its `lora` is set where they are adapters.
            base: of adapters.
            memory: of the method.
        """
        partial, complete = self.folder / f".{_name(step)}.partial", self.folder / _name(step)
        if self.is_main:
            self._sweep()
            (partial / NETWORKS).mkdir(parents=True)
        self.barrier()
        for name, network in networks.items():
            network.save(partial / NETWORKS / name)
        if self.is_main:
            if base is None:
                save_weights(weights, partial / FOLDER_NAME, student)
            else:
                save_adapters(weights, partial / FOLDER_NAME, student, base)
            state = {"format": FORMAT, "step": step, "ranks": self.size, "data": dict(data),
                     "method": dict(memory or {})}  # fmt: skip
            (partial / "state.json").write_text(json.dumps(state, indent=1))
        else:
            for _ in weights:  # gathering a weight takes all ranks
                pass
        self.barrier()
        if self.is_main:
            remove_checkpoint(complete)
            partial.rename(complete)
            self._point_to_newest()
            for old in complete_checkpoints(self.folder)[: -self.keep]:
                remove_checkpoint(old)
        self.barrier()
        return complete

    def _sweep(self) -> None:
        """Remove what killed runs left behind."""
        for pattern in (".step_*.partial", ".step_*.deleting"):
            for left_over in self.folder.glob(pattern):
                shutil.rmtree(left_over)

    def _point_to_newest(self) -> None:
        """`latest` names the newest checkpoint, for people and scripts; nothing of ours relies on it."""
        write_text(self.folder / "latest", complete_checkpoints(self.folder)[-1].name)

    def load(self, folder: Path, networks: Mapping[str, Checkpointed]) -> None:
        """Restore every network; on all ranks together."""
        if self.is_main:
            self._point_to_newest()  # a run may have died between the checkpoint and its pointer
        for name, network in networks.items():
            network.load(folder / NETWORKS / name)


def newest_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The state of the newest complete checkpoint of a folder, with its own folder under `folder`; None without one.

    Raises:
        ConfigError: it is of another format.
    """
    checkpoints = complete_checkpoints(folder)
    if not checkpoints:
        return None
    state = json.loads((checkpoints[-1] / "state.json").read_text())
    if state.get("format") != FORMAT:
        raise ConfigError(f"checkpoint ({checkpoints[-1]}) must be of format {FORMAT}: another version of afd_scale "
                          "wrote it; choose another `out` or `name`, or train.resume=false")  # fmt: skip
    return {"method": {}, **state, "folder": checkpoints[-1]}  # earlier ones lack it


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint so that no half of it ever passes for complete."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.deleting")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _name(step: int) -> str:
    return f"step_{step:08d}"
