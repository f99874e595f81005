"""Whether the shards of a dataset are what was written."""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NotRequired

import xxhash
from filelock import FileLock
from pydantic import AfterValidator, ConfigDict, NonNegativeInt, PositiveInt, TypeAdapter, with_config
from typing_extensions import TypedDict

from afd_scale.config import ConfigError
from afd_scale.data.schema import FACTS_FILE, HASH, INDEX_FILE, PROMPTS_FILE, DatasetFacts, PromptEntry, load_prompts
from afd_scale.data.storage import Location, fetch_facts
from afd_scale.files import FileName, read_json, replacing, system_errors, write_text
from afd_scale.torchvision_ops import define_torchvision_ops

log = logging.getLogger(__name__)


@with_config(ConfigDict(extra="allow", strict=True))
class _Part(TypedDict):
    """A file of a shard, as MDS has it."""

    basename: FileName
    bytes: NotRequired[NonNegativeInt]  # where it lacks, validation names the shard
    hashes: dict[str, str]


def _hashed(part: _Part) -> _Part:
    if HASH not in part["hashes"]:
        raise ValueError(f"{part['basename']} must have its {HASH}")
    return part


_HashedPart = Annotated[_Part, AfterValidator(_hashed)]


@with_config(ConfigDict(extra="allow", strict=True))
class _Entry(TypedDict):
    """A shard."""

    column_names: list[str]
    column_encodings: list[str]
    compression: str | None
    samples: PositiveInt
    raw_data: _HashedPart
    zip_data: _HashedPart | None


@with_config(ConfigDict(extra="allow", strict=True))
class _Index(TypedDict):
    shards: list[_Entry]


_INDEX = TypeAdapter(_Index)
_KNOWN = TypeAdapter(dict[str, list[int | str]])

_NOTED_SECONDS = 30.0  # between two notes of what was hashed
_UNPACKING = ".unpacking.lock"  # in a dataset's folder, for jobs that start at once


class KnownGood:
    """Files that were hashed before, and what `_state` was then: what has not changed since is not read again.

    Notes of them are kept in the cache, for datasets may be read-only; they spare a start to read terabytes. They are
    written now and then, so that a kill costs half a minute, and when the block ends, also when a file is not good.

    Args:
        rank: whose note what is added goes into; those of all ranks are read.

    Attributes:
        files: by name.
    """

    def __init__(self, location: Location, rank: int = 0):
        name = f"validated.{location.digest}"
        self.files: dict[str, Any] = {}
        for path in sorted(location.cache.glob(f"{name}*.json")):
            with suppress(ConfigError):  # damaged: what it says is hashed again
                noted = read_json(path, "data.cache", "hold what was hashed", _KNOWN)
                self.files |= noted
        self._path = location.cache / (f"{name}.{rank}.json" if rank else f"{name}.json")
        self._noted, self._when = dict(self.files), time.monotonic()

    def __enter__(self) -> "KnownGood":
        return self

    def __exit__(self, *error: object) -> None:
        self._note()

    def now_and_then(self) -> None:
        """Note what was added, when some time has passed since the last note."""
        if time.monotonic() - self._when > _NOTED_SECONDS:
            self._note()

    def _note(self) -> None:
        if self.files == self._noted:
            return
        self._noted, self._when = dict(self.files), time.monotonic()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._path, json.dumps(self.files))
        except OSError as problem:  # the next start reads everything again
            log.warning("data.cache (%s) cannot be written to, %s: shards are hashed at every start",
                        self._path.parent, problem.strerror)  # fmt: skip


def load_beside(location: Location) -> tuple[DatasetFacts, tuple[PromptEntry, ...], list[dict[str, Any]]]:
    """What lies beside a dataset's shards: its facts, its prompts, the entries of its shards.

    Raises:
        ConfigError: it is not there, or cannot be used.
    """
    fetch_facts(location)
    if not location.folder.is_dir():
        raise ConfigError(f"{location.field} ({location.shards}) must be an MDS dataset with {FACTS_FILE}: nothing is "
                          "there; make it with tools/make_shards.py")  # fmt: skip
    facts = DatasetFacts.load(location.folder, location.field)
    return facts, load_prompts(location.folder, location.field), _load_index(location, facts)


def _load_index(location: Location, facts: DatasetFacts) -> list[dict[str, Any]]:
    path = location.folder / INDEX_FILE
    rule = "be an MDS index of prompts and videos"
    shards: Sequence[Any] = read_json(path, location.field, rule, _INDEX, "; make the dataset again")["shards"]
    for shard in shards:
        columns = dict(zip(shard["column_names"], shard["column_encodings"]))
        if columns != facts.columns:  # encodings too: streaming would unpickle a column that says it is one
            raise ConfigError(f"{location.field} ({path}) must {rule}: a shard has the columns {columns} instead of "
                              f"{facts.columns}; make the dataset again")  # fmt: skip
    return list(shards)


def contradictions(
    facts: DatasetFacts, prompts: Sequence[PromptEntry], shards: Sequence[dict[str, Any]]
) -> Iterator[str]:
    """What the files beside a dataset's shards say against each other, a line each."""
    held = sum(shard["samples"] for shard in shards)
    if held != facts.num_samples:
        yield f"{INDEX_FILE}: must have the {facts.num_samples} samples of {FACTS_FILE}, it has {held}"
    for prompt in prompts:
        if not 0 <= prompt.sample < held:
            yield f"{PROMPTS_FILE}: must name samples from 0 to {held - 1}, {prompt.prompt_id} names {prompt.sample}"


def shards_digest(location: Location) -> str:
    """Names what the shards of a checked dataset hold: another order or other samples have another one."""
    rule = "be an MDS index of prompts and videos"
    index = read_json(location.folder / INDEX_FILE, location.field, rule, _INDEX)
    held = [(shard["samples"], shard["raw_data"]["hashes"][HASH]) for shard in index["shards"]]
    return xxhash.xxh64(json.dumps(held)).hexdigest()


def check_shard(location: Location, shard: dict[str, Any], known: dict[str, Any]) -> None:
    """Check a shard's files on this machine.

    A local one that is compressed is unpacked beside it. A copy of a remote one that is not what the index says, of an
    earlier dataset perhaps, is removed: it is downloaded again.

    Raises:
        ConfigError: a file cannot be read or is damaged.
    """
    unpacked = shard["raw_data"]
    path = location.folder / unpacked["basename"]
    if location.is_remote:  # what an earlier run has downloaded and unpacked; the rest is validated as it arrives
        if path.exists():
            try:
                _check_file(location, path, unpacked, "it is downloaded again", known)
            except ConfigError as problem:
                log.warning("%s", problem)
                path.unlink(missing_ok=True)
        return
    packed = shard["zip_data"]
    if packed:
        _check_file(location, location.folder / packed["basename"], packed, "make the dataset again", known)
        _unpack(location, location.folder / packed["basename"], path, shard["compression"])
    remedy = "delete it, it is unpacked again" if packed else "make the dataset again"
    _check_file(location, path, unpacked, remedy, known)


def _unpack(location: Location, packed: Path, path: Path, compression: str) -> None:
    """Unpack a shard unless that was done."""
    if path.exists():
        return
    define_torchvision_ops()
    from streaming.base.compression import decompress

    rule = f"{location.field} ({path.parent}) must be writable, for shards are unpacked in their folder"
    remedy = f"; as file://{path.parent.absolute()} it is copied to data.cache"
    with system_errors(rule, remedy), FileLock(path.with_name(_UNPACKING)):
        if not path.exists():
            with replacing(path) as growing:
                growing.write_bytes(decompress(compression, packed.read_bytes()))


def _check_file(location: Location, path: Path, part: dict[str, Any], remedy: str, known: dict[str, Any]) -> None:
    expected = part["hashes"][HASH]
    if path.exists() and known.get(path.name) == _state(path, expected):
        return
    with system_errors(f"{location.field} ({path}) must be readable", f"; {remedy}"):
        found = hash_of(path)
    if found != expected:
        raise ConfigError(f"{location.field} ({path}) must have {HASH} {expected}, it has {found}: "
                          f"the file is corrupt or truncated; {remedy}")  # fmt: skip
    known[path.name] = _state(path, expected)


def hash_of(path: Path) -> str:
    """What a shard's file is known by, in the index."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh64).hexdigest()  # type: ignore[arg-type]  # typed for hashlib's own


def _state(path: Path, expected: str) -> list[Any]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns, expected]
