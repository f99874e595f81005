"""ZeRO-3 shards on disk, written by one number of ranks and read by any.

ZeRO-3 flattens a parameter, pads it, and gives rank r of W the elements [r c, (r + 1) c), c = ceil(numel / W). Every
rank writes its shards into a file of its own; a rank of another world reads the slices that overlap its part, and no
more.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from afd_scale.config import one_line
from afd_scale.config.plain import parse_json


@dataclass(frozen=True)
class Shards:
    """One rank's shards of a network in host memory.

    Attributes:
        tensors: 1-D, padded, by name.
        facts: JSON, alike on all ranks, given back when they are read.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]

    def write(self, folder: Path, rank: int, ranks: int) -> Path:
        """Write them into a file of this rank's, and return it; every rank does so into the same folder, which is made
        where it is not there.

        Raises:
            OSError: the disk is full or fails.
        """
        folder.mkdir(exist_ok=True)
        path = folder / _name(rank)
        path.touch()
        mode = path.stat().st_mode
        try:
            save_file(dict(self.tensors), path, metadata={"facts": json.dumps({"ranks": ranks, **self.facts})})
        except SafetensorError as error:  # a full disk, for one
            raise OSError(one_line(error)) from error
        path.chmod(mode)  # safetensors 0.8 leaves 0600, which shuts out the rest of a cluster's group
        return path


def snapshot(shards: Iterable[tuple[str, Tensor]], **facts: Any) -> Shards:
    """Copies of shards in host memory; each is copied before the next is asked for."""
    copies = {name: shard.detach().reshape(-1).to("cpu", copy=True) for name, shard in shards}
    return Shards(copies, facts)


class SavedShards:
    """Shards of all ranks that wrote a folder.

    Use it as a context: a file is opened when something of it is asked for, and stays open, and only that is read.

    Args:
        first: rank whose file says how many there are; a reader's own, where as many read as wrote.
    """

    def __init__(self, folder: Path, first: int = 0):
        self._folder, self._stack = folder, ExitStack()
        self._files: dict[int, Any] = {}
        self._first = first if (folder / _name(first)).is_file() else 0

    def __enter__(self) -> "SavedShards":
        """Open the first file.

        Raises:
            ValueError: it is absent or damaged.
        """
        try:
            self.facts: dict[str, Any] = parse_json((self._open(self._first).metadata() or {})["facts"])
            self._ranks: int = self.facts["ranks"]
        except (KeyError, ValueError) as error:
            self._stack.close()
            raise self._damaged(error) from error
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def part(self, name: str, numel: int, rank: int, ranks: int) -> Tensor:
        """The shard of one rank among so many.

        Args:
            name: of the tensor.
            numel: its elements, without padding.
        Returns:
            (ceil(numel / ranks),), padded with zeros.
        Raises:
            ValueError: there is no such tensor, or it is of another size; a file is absent or damaged.
        """
        theirs, ours = -(-numel // self._ranks), -(-numel // ranks)
        begin, end = rank * ours, min((rank + 1) * ours, numel)
        part = torch.zeros(ours)
        for number in range(begin // theirs, -(-end // theirs) if end > begin else begin // theirs):
            low, high = max(begin, number * theirs), min(end, (number + 1) * theirs)
            shard = self._slice(number, name, theirs)
            part[low - begin : high - begin] = shard[low - number * theirs : high - number * theirs]
        return part

    def _slice(self, number: int, name: str, size: int) -> Any:
        try:
            shard = self._open(number).get_slice(name)
        except SafetensorError:
            raise ValueError(f"checkpoint ({self._folder}) must hold {name}: it is of another network") from None
        if shard.get_shape() != [size]:
            raise ValueError(f"checkpoint ({self._folder}) must hold {name} in shards of {size}: they are of "
                             f"{shard.get_shape()}, of another network")  # fmt: skip
        return shard

    def _open(self, rank: int) -> Any:
        if rank not in self._files:
            try:
                self._files[rank] = self._stack.enter_context(safe_open(self._folder / _name(rank), "pt"))
            except (OSError, SafetensorError) as error:
                raise self._damaged(error) from error
        return self._files[rank]

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(f"checkpoint ({self._folder}) must hold a file of every rank that wrote it: "
                          f"{one_line(error)}")  # fmt: skip


def _name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"
