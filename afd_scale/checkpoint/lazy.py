"""Weights that stay on disk: their shapes are known at once, and each tensor is read when it is asked for.

A file is opened anew for every tensor: the pages of one that stays open would add up in memory to all of it.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SAFETENSORS, INDEX, TORCH = ".safetensors", ".safetensors.index.json", (".pt", ".pth", ".bin")
SUFFIXES = (SAFETENSORS, *TORCH, INDEX)


@dataclass(frozen=True)
class Stored:
    """A tensor on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


Tree = dict[str, Any]  # of names to Stored, or to further such dictionaries, or to what else a file holds


class LazyState(Mapping[str, Tensor]):
    """A state dict whose tensors are read one by one, each time anew.

    Args:
        stored: what there is to read, by name.
    """

    def __init__(self, stored: Mapping[str, Stored]):
        self.stored = dict(stored)

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name].read()

    def __contains__(self, name: object) -> bool:  # Mapping's own would read it
        return name in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def numel(self) -> int:
        """Elements of all tensors."""
        return sum(torch.Size(stored.shape).numel() for stored in self.stored.values())

    def converted(self, convert: Callable[[str, Tensor], Tensor]) -> "LazyState":
        """The same with a function over each tensor that keeps its shape."""

        def reader(name: str, stored: Stored) -> Callable[[], Tensor]:
            return lambda: convert(name, stored.read())

        return LazyState({n: Stored(s.shape, s.dtype, reader(n, s)) for n, s in self.stored.items()})


def in_memory(tensors: dict[str, Tensor]) -> LazyState:
    """Tensors that are there already, in the form of those that are read."""

    def stored(tensor: Tensor) -> Stored:
        return Stored(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    return LazyState({name: stored(tensor) for name, tensor in tensors.items()})


def open_weights(path: Path) -> Tree:
    """What a file holds, or a folder with one set of weights in it, whatever their names.

    Raises:
        ValueError: it is damaged, or holds more than tensors; the folder holds none, or several.
    """
    if path.is_dir():
        path = only_weights(path)
    if path.name.endswith(INDEX):
        return _open_index(path)
    if path.suffix == SAFETENSORS:
        indices = (file for file in path.parent.glob(f"*{INDEX}") if path.name in _weight_map(file).values())
        index = next(indices, None)  # of the set that a shard is of
        return dict(open_safetensors(path)) if index is None else _open_index(index)
    if path.suffix in TORCH:
        return _open_torch(path)
    raise ValueError(f"weights ({path}) must end in one of {', '.join(SUFFIXES)}")


def open_safetensors(path: Path) -> dict[str, Stored]:
    """One safetensors file."""

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with _readable(path) as file:
                tensor: Tensor = file.get_tensor(name)
            return tensor

        return read

    with _readable(path) as file:
        mapped = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    return {name: Stored(tuple(tensor.shape), tensor.dtype, reader(name)) for name, tensor in mapped.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says beside the tensors."""
    with _readable(path) as file:
        return dict(file.metadata() or {})


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object; ValueError in one line for anything else."""
    try:
        said = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{what} ({path}) must be a readable JSON file: {error}") from error
    if not isinstance(said, dict):
        raise ValueError(f"{what} ({path}) must be a JSON object, it is {type(said).__name__}")
    return said


@contextmanager
def _readable(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"weights ({path}) must be a whole safetensors file: {error}") from error


def only_weights(folder: Path) -> Path:
    """The file by which a folder's weights are opened: an index before single files, safetensors before others."""
    for suffix in (INDEX, SAFETENSORS, *TORCH):
        found = sorted(path for path in folder.glob(f"*{suffix}") if not path.name.startswith("."))
        if len(found) > 1:
            raise ValueError(f"weights ({folder}) must be one set of files: it holds {found[0].name} and "
                             f"{found[1].name}; name one of them")  # fmt: skip
        if found:
            return found[0]
    raise ValueError(f"weights ({folder}) must hold weights: there is no file that ends in {', '.join(SUFFIXES)}")


def _weight_map(index: Path) -> dict[str, str]:
    said = read_json(index, "weights").get("weight_map")
    if not isinstance(said, dict):
        raise ValueError(f"weights ({index}) must be an index of shards: it holds no weight_map")
    return said


def _open_index(index: Path) -> Tree:
    weight_map = _weight_map(index)
    stored: Tree = {}
    for name in sorted(set(weight_map.values())):
        stored |= open_safetensors(index.parent / name)
    if absent := sorted(weight_map.keys() - stored.keys()):
        raise ValueError(f"weights ({index.parent}) must hold every tensor of its index: {absent[0]} is missing")
    return stored


def _open_torch(path: Path) -> Tree:
    """A file of torch.save whose pickle may make tensors alone; before torch 1.6, or compressed, it is read whole."""
    try:
        in_parts = zipfile.is_zipfile(path) and _is_uncompressed(path)
        tree = torch.load(path, map_location="meta" if in_parts else "cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        found = re.search(r"GLOBAL (\S+)", str(error))  # torch's text goes on to advise to allow it
        reason = f"it holds {found[1]}, and such objects can run code" if found else "it is damaged"
        raise ValueError(f"weights ({path}) must be a torch file of tensors alone: {reason}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"weights ({path}) must hold a dict of tensors, it holds {type(tree).__name__}")
    return _stored_tree(path if in_parts else None, tree)


def _is_uncompressed(path: Path) -> bool:
    """Whether the bytes of tensors are in the file as they are; torch.save leaves them so."""
    with zipfile.ZipFile(path) as file:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in file.infolist())


def _stored_tree(path: Path | None, tree: Mapping[Any, Any]) -> Tree:
    """A tree of tensors on meta, or of whole ones where there is no path, as one of Stored."""

    def stored(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _stored_tree(path, value)
        if not isinstance(value, Tensor):
            return value
        read = (lambda: value) if path is None else (lambda: _read_storage(path, value))
        return Stored(tuple(value.shape), value.dtype, read)

    return {str(name): stored(value) for name, value in tree.items()}


def _read_storage(path: Path, on_meta: Tensor) -> Tensor:
    """The tensor that torch.load has left on meta, with the place of its bytes in the file."""
    storage = on_meta.untyped_storage()
    offset = storage._checkpoint_offset
    assert offset is not None
    try:
        mapped = numpy.memmap(path, numpy.dtype("uint8"), "c", offset, storage.nbytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"weights ({path}) must stay as they are while they are read: {error}") from error
    flat = torch.from_numpy(mapped).view(on_meta.dtype)
    return flat.as_strided(on_meta.shape, on_meta.stride(), on_meta.storage_offset())
