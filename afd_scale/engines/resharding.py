"""ZeRO-3 shards on disk, written by one number of ranks and read by any.

ZeRO-3 flattens a parameter, pads it, and gives rank r of W the elements [r c, (r + 1) c), c = ceil(numel / W). Every
rank writes its shards into a file of its own; a rank of another world reads the slices that overlap its part, and no
more.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from afd_scale.config import one_line


def save_shards(folder: Path, shards: Mapping[str, Tensor], **facts: Any) -> None:
    """Write this rank's shards.

    Args:
        folder: made where it is not there; every rank writes its file into it.
        shards: 1-D, padded, by name.
        facts: JSON, alike on all ranks, given back when they are read.
    """
    folder.mkdir(exist_ok=True)
    flat = {name: shard.detach().reshape(-1).contiguous().cpu() for name, shard in shards.items()}
    written = json.dumps({"ranks": dist.get_world_size(), **facts})
    path = folder / _name(dist.get_rank())
    path.touch()
    mode = path.stat().st_mode
    save_file(flat, path, metadata={"facts": written})
    path.chmod(mode)  # safetensors 0.8 leaves 0600, which shuts out the rest of a cluster's group


class SavedShards:
    """Shards of all ranks that wrote a folder.

    Use it as a context: files stay open, and only what is asked for is read.
    """

    def __init__(self, folder: Path):
        self._folder, self._stack = folder, ExitStack()

    def __enter__(self) -> "SavedShards":
        """Open the files.

        Raises:
            ValueError: one is absent or damaged.
        """
        try:
            self._files = [self._open(0)]
            self.facts: dict[str, Any] = json.loads((self._files[0].metadata() or {})["facts"])
            self._files += [self._open(rank) for rank in range(1, self.facts["ranks"])]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            self._stack.close()
            raise ValueError(f"checkpoint ({self._folder}) must hold a file of every rank that wrote it: "
                             f"{one_line(error)}") from error  # fmt: skip
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
            ValueError: there is no such tensor, or it is of another size.
        """
        theirs, ours = -(-numel // len(self._files)), -(-numel // ranks)
        begin, end = rank * ours, min((rank + 1) * ours, numel)
        part = torch.zeros(ours)
        for number in range(begin // theirs, -(-end // theirs) if end > begin else begin // theirs):
            low, high = max(begin, number * theirs), min(end, (number + 1) * theirs)
            shard = self._slice(number, name, theirs)
            part[low - begin : high - begin] = shard[low - number * theirs : high - number * theirs]
        return part

    def _slice(self, number: int, name: str, size: int) -> Any:
        try:
            shard = self._files[number].get_slice(name)
        except SafetensorError:
            raise ValueError(f"checkpoint ({self._folder}) must hold {name}: it is of another network") from None
        if shard.get_shape() != [size]:
            raise ValueError(f"checkpoint ({self._folder}) must hold {name} in shards of {size}: they are of "
                             f"{shard.get_shape()}, of another network")  # fmt: skip
        return shard

    def _open(self, rank: int) -> Any:
        return self._stack.enter_context(safe_open(self._folder / _name(rank), "pt"))


def _name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"
