"""The student's own weight folder: safetensors shards, their index, and `student.json`.

Keys are those of `CausalWan.state_dict()`, which are original Wan's. Everything is written under a temporary name and
renamed when complete, so that a folder with its final name is whole.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from afd_scale.checkpoint.lazy import INDEX
from afd_scale.config.models import PolicyConfig
from afd_scale.files import read_json

CONFIG_NAME = "student.json"
FOLDER_NAME = "student"
STEM = "model"
MAX_SHARD_BYTES = 5_000_000_000
POLICY = TypeAdapter(PolicyConfig)


def save_weights(
    state: Iterable[tuple[str, Tensor]], folder: Path, config: PolicyConfig, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a student folder; at most one shard is held in memory.

    Args:
        state: names and tensors, one by one. Each is copied before the next is asked for, so a tensor gathered from
            ZeRO-3 shards may vanish then.
        folder: `<checkpoint>/student`.
    Raises:
        ValueError: the folder exists.
    """
    with written_whole(folder) as partial:
        partial.mkdir()
        write_shards(state, partial, STEM, max_shard_bytes)
        (partial / CONFIG_NAME).write_text(config.model_dump_json(indent=2))


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run's `checkpoints` folder, oldest first: a checkpoint is complete by existing."""
    return sorted(folder.glob("step_" + "[0-9]" * 8))


def find_weights(path: Path) -> Path:
    """The student folder of a run folder (its newest complete checkpoint), a checkpoint folder or a student folder.

    Raises:
        ValueError: there is none.
    """
    if not path.exists():
        raise ValueError(f"weights ({path}) must exist: there is no such file or folder")
    checkpoints = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    complete = complete_checkpoints(checkpoints)
    if complete:
        path = complete[-1]
    elif checkpoints != path:
        raise ValueError(f"weights ({path}) must hold a complete checkpoint: there is none in {checkpoints} yet")
    folder = path / FOLDER_NAME if (path / FOLDER_NAME).is_dir() else path
    if any(name.startswith(".") and name.endswith(".partial") for name in (folder.name, folder.parent.name)):
        raise ValueError(f"weights ({path}) must be complete: a checkpoint of this name is still being written")
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"weights ({path}) must be a run, checkpoint or student folder: it holds no {CONFIG_NAME}")
    return folder


def read_config(path: Path) -> PolicyConfig:
    """A PolicyConfig from its JSON file; ConfigError in one line."""
    return read_json(path, "weights", "describe a student", POLICY)


def write_shards(state: Iterable[tuple[str, Tensor]], folder: Path, stem: str, max_shard_bytes: int) -> None:
    """Write `stem.safetensors`, or numbered shards and an index when it would grow beyond `max_shard_bytes`.

    The names are Hugging Face's, which transformers and diffusers read. A tensor larger than the limit gets a shard
    of its own.
    """
    shards: list[tuple[Path, list[str]]] = []
    shard: dict[str, Tensor] = {}
    shard_bytes = total_bytes = 0

    def close_shard() -> None:
        path = folder / f"{stem}.{len(shards)}.unnumbered"  # the count is known only at the end
        save_safetensors(shard, path)
        shards.append((path, list(shard)))
        shard.clear()

    for name, tensor in state:
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            close_shard()
            shard_bytes = 0
        shard[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        shard_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    close_shard()

    if len(shards) == 1:
        shards[0][0].rename(folder / f"{stem}.safetensors")
        return
    weight_map = {}
    for number, (path, names) in enumerate(shards, start=1):
        target = path.rename(folder / f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors")
        weight_map.update(dict.fromkeys(names, target.name))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / f"{stem}{INDEX}").write_text(json.dumps(index, indent=2))


def save_safetensors(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """One safetensors file that Hugging Face's loaders accept, with the permissions of any new file; OSError."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:  # a full disk, for one
        raise OSError(str(error)) from error
    path.chmod(mode)  # safetensors 0.8 leaves 0600, which shuts out the rest of a cluster's group


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary sibling to write, a file or a folder; renamed to `path` on success, removed on failure.

    Raises:
        ValueError: `path` exists, or cannot be written (no permission, disk full).
    """
    if path.exists():
        raise ValueError(f"output ({path}) must not exist: nothing is overwritten")
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)  # of a killed attempt
        yield partial
        partial.rename(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"output ({path}) must be writable: {reason}") from error
    finally:
        with suppress(OSError):
            _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
