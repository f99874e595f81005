"""Any network of a run's checkpoint, put together from the shards of all ranks that wrote it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from afd_scale.checkpoint.checksums import DamagedError, check_below
from afd_scale.checkpoint.formats.lora import DOWN, LINEARS, UP, Lora
from afd_scale.checkpoint.lazy import LazyState, Stored
from afd_scale.checkpoint.resume import read_state
from afd_scale.checkpoint.run_state import NETWORKS
from afd_scale.config.models import StudentConfig
from afd_scale.engines.resharding import SavedShards
from afd_scale.layers.lora import FOLDER

ROLES = {"student": "student", "old_policy": "old_policy", "ema": "average"}  # by the names that users know
_TRAINED = "weight/"  # before the names of a network's parameters that has optimizer states beside them


def open_role(checkpoint: Path, weights: str | None, shapes: Mapping[str, tuple[int, ...]]) -> LazyState:
    """A role's whole weights, float32.

    Args:
        checkpoint: a run's `step_XXXXXXXX`.
        weights: of ROLES; None is the one that the run exports.
        shapes: of all parameters, by name.
    Raises:
        ValueError: the run has no such role, or its shards are damaged.
    """
    return _opened(_folder(checkpoint, weights), shapes)


def open_network(checkpoint: Path, role: str, shapes: Mapping[str, tuple[int, ...]]) -> LazyState:
    """The whole weights of any network of a checkpoint by its role, a judge's say; the rest as of `open_role`."""
    with _damage_told(checkpoint):
        return _opened(_shards_of(checkpoint, role), shapes)


def open_role_adapters(checkpoint: Path, weights: str, student: StudentConfig) -> Lora:
    """A role's adapters; arguments and errors as of `open_role`.

    Args:
        student: the section, its `lora` set.
    """
    folder, role, lora = _folder(checkpoint, weights), ROLES[weights], student.lora
    assert lora is not None
    tensors: dict[str, Stored] = {}
    modules = [f"blocks.{layer}.{linear}" for layer in range(student.num_layers) for linear in LINEARS]
    for module in modules:
        outputs = student.ffn_dim if module.endswith("ffn.0") else student.dim
        inputs = student.ffn_dim if module.endswith("ffn.2") else student.dim
        for side, shape in ((DOWN, (lora.rank, inputs)), (UP, (outputs, lora.rank))):
            tensors[f"{module}.{side}"] = _stored(folder, f"{module}.{FOLDER}.{role}.{side}", shape)
    return Lora(LazyState(tensors), dict.fromkeys(modules, lora.alpha / lora.rank))


def check_student(folder: Path) -> None:
    """Check the files of a checkpoint's `student/`; ValueError. One that lies elsewhere has no checksums."""
    with _damage_told(folder):
        check_below(folder.parent, 1, folder.name)


def _folder(checkpoint: Path, weights: str | None) -> Path:
    """The folder of a role's shards, checked."""
    with _damage_told(checkpoint):
        role = read_state(checkpoint)["exported"] if weights is None else ROLES[weights]
        return _shards_of(checkpoint, str(role), weights or "the weights of its student")


def _shards_of(checkpoint: Path, role: str, called: str | None = None) -> Path:
    folder = checkpoint / NETWORKS / role
    if not folder.is_dir():
        there = sorted(path.name for path in (checkpoint / NETWORKS).glob("*")) or ["no networks"]
        raise ValueError(f"weights ({checkpoint}) must hold {called or role}: it is of a run without it, with "
                         f"{', '.join(there)}")  # fmt: skip
    check_below(checkpoint, read_state(checkpoint)["ranks"], f"{NETWORKS}/{role}")
    return folder


def _opened(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> LazyState:
    return LazyState({name: _stored(folder, name, shape) for name, shape in shapes.items()})


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    try:
        yield
    except DamagedError as error:
        raise ValueError(f"weights ({path}) must be whole: {error}; name another checkpoint") from error


def _stored(folder: Path, name: str, shape: tuple[int, ...]) -> Stored:
    def read() -> Tensor:
        with SavedShards(folder) as saved:
            trained = "optimizer_steps" in saved.facts
            flat: Tensor = saved.part(f"{_TRAINED if trained else ''}{name}", torch.Size(shape).numel(), 0, 1)
        return flat.view(shape)

    return Stored(shape, torch.float32, read)
