"""Weights that stay on disk: their shapes are known at once, and each tensor is read when it is asked for.

A file is opened anew for every tensor: the pages of one that stays open would add up in memory to all of it.
"""

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy
import torch
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import Parameter
from typing_extensions import TypedDict

from afd_scale.checkpoint.signatures import file_kind, folder_kind
from afd_scale.config import ConfigError
from afd_scale.files import FileName, read_json

SAFETENSORS, INDEX, TORCH = ".safetensors", ".safetensors.index.json", (".pt", ".pth", ".bin", ".ckpt")
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
# What trainers leave beside weights.
_NO_WEIGHTS = re.compile(r"optim|scheduler|training_args|rng_state|random_states|\w*zero_pp_rank|.*optim_states")
_BAD_PICKLE = (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, OSError, LookupError, ValueError,
               TypeError, AttributeError, AssertionError, struct.error)  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class _Index(TypedDict):
    """Of shards, as Hugging Face's libraries write it."""

    weight_map: Annotated[dict[str, FileName], Field(min_length=1)]  # name of a tensor to its file


_OBJECT, _INDEX = TypeAdapter(dict[str, Any]), TypeAdapter(_Index)

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


def finite(state: LazyState, path: Path) -> LazyState:
    """The same with each tensor checked as it is read.

    Args:
        path: that an error names.
    """

    def checked(name: str, tensor: Tensor) -> Tensor:
        if not torch.stack(tensor.aminmax()).isfinite().all():  # which takes no memory, as isfinite() of all would
            raise ValueError(f"weights ({path}) must be finite: {name} holds NaN or infinity, as a diverged run leaves "
                             "them")  # fmt: skip
        return tensor

    return state.converted(checked)


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
    if _is_index(path):
        return _open_index(path)
    index = next((file for file in sorted(path.parent.glob("*.index*.json")) if _lists(file, path.name)), None)
    if index is not None:  # of the set that a shard is of
        return _open_index(index)
    stored: Tree = {}
    for shard in _numbered(path):
        stored |= _open_file(shard)
    return stored


def _open_file(path: Path) -> Tree:
    """One file, by its beginning before its suffix."""
    try:
        kind = file_kind(path)
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise ValueError(f"weights ({path}) must be readable: {error.strerror}") from error
    if kind is not None:
        raise ValueError(f"weights ({path}) must be a file of tensors: this is {kind}")
    is_torch = head[8:] != b"{" and head.startswith((b"PK", b"\x80"))  # a zip file, or a pickle as before torch 1.6
    if is_torch and path.suffix == SAFETENSORS:  # torch 2.13 goes by the name, too
        raise ValueError(f"weights ({path}) must be a safetensors file: this is a torch file: rename it to end in .pt")
    if head[8:] == b"{" or path.suffix == SAFETENSORS:
        return dict(open_safetensors(path))
    if is_torch or path.suffix in TORCH:
        return _open_torch(path)
    raise ValueError(f"weights ({path}) must be a safetensors or torch file: it begins as neither does")


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


def read_object(path: Path, what: str) -> dict[str, Any]:
    """A JSON object of another program; ConfigError in one line for anything else, which says what it is instead."""
    try:
        return read_json(path, what, "be a JSON object", _OBJECT)
    except ConfigError as error:
        if path.is_file() and (kind := file_kind(path)):
            raise ConfigError(f"{error}: this is {kind}") from error
        raise


@contextmanager
def _readable(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"weights ({path}) must be a whole safetensors file: {error}") from error


def only_weights(folder: Path) -> Path:
    """The file by which a folder's weights are opened: safetensors before torch files, an index before its shards.

    Raises:
        ValueError: there is none, or there are several sets.
    """
    files = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file())
    for suffixes in ((SAFETENSORS,), TORCH):
        indices = [path for path in files if _is_index(path) and path.name.split(".index")[0].endswith(suffixes)]
        listed = {name for index in indices for name in _weight_map(index).values()}
        single = [path for path in files if path.suffix in suffixes and path.name not in listed]
        sets = {_SHARD.sub(r"\g<stem>\g<count>\g<suffix>", path.name): path for path in reversed(single)
                if not _NO_WEIGHTS.match(path.name)}  # fmt: skip
        found = sorted([*indices, *sets.values()])
        if len(found) > 1:
            raise ValueError(f"weights ({folder}) must be one set of files: it holds {found[0].name} and "
                             f"{found[1].name}; name one of them")  # fmt: skip
        if found:
            return found[0]
    if kind := folder_kind(folder):
        raise ValueError(f"weights ({folder}) must be whole: this is {kind}")
    raise ValueError(f"weights ({folder}) must hold weights: there is no file that ends in "
                     f"{', '.join((SAFETENSORS, *TORCH))} or is their index")  # fmt: skip


def _is_index(path: Path) -> bool:
    return path.suffix == ".json" and ".index" in path.name and path.name != "model_index.json"


def _lists(index: Path, name: str) -> bool:
    try:
        return _is_index(index) and name in _weight_map(index).values()
    except ValueError:  # of something else, which is no matter of this file's
        return False


def _numbered(path: Path) -> list[Path]:
    """All shards of the set that a file is of by its name, though no index lists it; else the file."""
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    shards = [path.with_name(f"{match['stem']}-{n:05d}-of-{count:05d}{match['suffix']}") for n in range(1, count + 1)]
    if absent := [shard.name for shard in shards if not shard.is_file()]:
        raise ValueError(f"weights ({path}) must be whole: it is one part of {count}, and {absent[0]} is not beside it")
    return shards


def _weight_map(index: Path) -> dict[str, str]:
    return read_json(index, "weights", "be an index of shards", _INDEX)["weight_map"]


def _open_index(index: Path) -> Tree:
    weight_map = _weight_map(index)
    stored: Tree = {}
    for name in sorted(set(weight_map.values())):
        if not (index.parent / name).is_file():
            raise ValueError(f"weights ({index.parent}) must hold every file of its index: {name} is missing")
        stored |= _open_file(index.parent / name)
    if absent := sorted(weight_map.keys() - stored.keys()):
        raise ValueError(f"weights ({index.parent}) must hold every tensor of its index: {absent[0]} is missing")
    return stored


def _open_torch(path: Path) -> Tree:
    """A file of torch.save whose pickle may make tensors alone; before torch 1.6, or compressed, it is read whole."""
    try:
        in_parts = zipfile.is_zipfile(path) and _is_uncompressed(path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # a newer one that is read all the same
            tree = torch.load(path, map_location="meta" if in_parts else "cpu", weights_only=True)
    except _BAD_PICKLE as error:
        raise ValueError(f"weights ({path}) must be a torch file of tensors alone: {_why_not(path, error)}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"weights ({path}) must hold a dict of tensors, it holds {type(tree).__name__}")
    try:
        return _stored_tree(path, tree, in_parts)
    except RecursionError as error:
        raise ValueError(f"weights ({path}) must be a torch file of tensors: it is nested too deeply") from error


def _why_not(path: Path, error: Exception) -> str:
    """What is wrong with a torch file, without torch's advice to allow it."""
    found = re.search(r"(?:GLOBAL|type|class|reduce:) `?'?([A-Za-z_]\w*\.[\w.]+)", str(error))
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            names = [name.partition("/")[2] for name in file.namelist()]
        if "constants.pkl" in names:
            return "it is a program (TorchScript)"
        if "data.pkl" not in names:
            return "it is a zip file that torch.save did not write"
    try:
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except _BAD_PICKLE:
        classes = []
    if not classes and found is None:
        return "it is damaged"
    listed = ", ".join(sorted(classes)[:3]) if classes or found is None else found[1]
    return (f"it holds objects of class {listed}, which can run code; load it where you trust it, and save its "
            "tensors by themselves with torch.save")  # fmt: skip


def _is_uncompressed(path: Path) -> bool:
    """Whether the bytes of tensors are in the file as they are; torch.save leaves them so."""
    with zipfile.ZipFile(path) as file:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in file.infolist())


def _stored_tree(path: Path, tree: Mapping[Any, Any], in_parts: bool) -> Tree:
    """A tree of tensors as one of Stored; the tensors are on meta where they can be read in parts, or else whole."""

    def stored(value: Any) -> Any:
        if isinstance(value, list | tuple):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            return _stored_tree(path, value, in_parts)
        if not isinstance(value, Tensor):
            return value
        if type(value) not in (Tensor, Parameter) or value.layout != torch.strided or value.is_quantized:
            raise ValueError(f"weights ({path}) must hold plain tensors: one is a {type(value).__name__} of layout "
                             f"{value.layout}; save it as a dense tensor of numbers")  # fmt: skip
        read = (lambda: _read_storage(path, value)) if in_parts else value.detach
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
