"""Checksums of a checkpoint's files: noted by the ranks that wrote them, checked by the ranks that read them."""

import errno
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import xxhash
from pydantic import AfterValidator, TypeAdapter
from safetensors import SafetensorError, safe_open
from typing_extensions import TypedDict

from afd_scale.config import ConfigError, one_line
from afd_scale.config.errors import shown
from afd_scale.files import checked_json, sync, write_text

NOTES = "checksums"  # folder of each rank's notes in a checkpoint
_PIECE = 2**24  # bytes that are hashed at a time


class _Noted(TypedDict):
    bytes: int
    xxh3: str


def _inside(name: str) -> str:
    """A note leads to no file outside its checkpoint, whoever wrote it."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"a file's path ({shown(name)}) must stay in the checkpoint")
    return name


Note = dict[Annotated[str, AfterValidator(_inside)], _Noted]  # by the file's path in the checkpoint
_NOTE = TypeAdapter(Note)


class DamagedError(ValueError):
    """A checkpoint is not what was written; one line."""


def note_of(checkpoint: Path, rank: int) -> Path:
    """What a rank noted of the files that it answers for."""
    return checkpoint / NOTES / f"rank_{rank:05d}.json"


def write_note(checkpoint: Path, rank: int, files: Iterable[Path]) -> None:
    """Bring files to the disk and note their sizes and checksums; the note is there when all of them are.

    Raises:
        OSError: the disk is full or fails.
    """
    noted = {}
    for file in files:
        sync(file)
        noted[file.relative_to(checkpoint).as_posix()] = {"bytes": file.stat().st_size, "xxh3": _hash(file)}
    (checkpoint / NOTES).mkdir(exist_ok=True)
    write_text(note_of(checkpoint, rank), json.dumps(noted, indent=1))


def noted_files(checkpoint: Path, ranks: Iterable[int]) -> set[Path]:
    """The files that these ranks answer for."""
    return {checkpoint / name for rank in ranks for name in _read_note(checkpoint, rank)}


def check_part(checkpoint: Path, ranks: int, rank: int, size: int) -> None:
    """Check the files of a checkpoint that fall to one of the ranks that read it; together they check all, each once.

    Where as many ranks read as wrote, each checks its own.

    Args:
        ranks: that wrote the checkpoint.
        rank, size: of those that read it.
    Raises:
        DamagedError: names the first file that is absent or not what was written.
    """
    if not (checkpoint / NOTES).is_dir():  # of an earlier format
        for file in sorted(checkpoint.rglob("*.safetensors"))[rank::size]:
            _check_opens(file)
        return
    for writer in range(rank, ranks, size):
        _check(checkpoint, _read_note(checkpoint, writer))


def check_below(checkpoint: Path, ranks: int, folder: str) -> None:
    """Check what lies in a folder of a checkpoint, or is the file of that name; arguments and errors of `check_part`.

    Args:
        folder: relative to the checkpoint.
    """
    if (checkpoint / NOTES).is_dir():
        for writer in range(ranks):
            note = _read_note(checkpoint, writer)
            _check(checkpoint, {name: said for name, said in note.items() if f"{name}/".startswith(f"{folder}/")})


def _check(checkpoint: Path, note: Note) -> None:
    for name, said in note.items():
        file = checkpoint / name
        try:
            size = file.stat().st_size
            if size != said["bytes"]:
                raise DamagedError(f"{name} has {size} bytes, {said['bytes']} were written")
            if _hash(file) != said["xxh3"]:
                raise DamagedError(f"{name} is not what was written: its checksum is another")
        except OSError as error:
            raise _unreadable(file, error) from error


def _check_opens(file: Path) -> None:
    try:
        with safe_open(file, "pt"):
            pass
    except SafetensorError as error:
        raise DamagedError(f"{file.name} is no whole safetensors file: {one_line(error)}") from error
    except OSError as error:
        raise _unreadable(file, error) from error


def _read_note(checkpoint: Path, rank: int) -> Note:
    path = note_of(checkpoint, rank)
    try:
        return checked_json(path.read_bytes(), _NOTE)
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise DamagedError(f"{NOTES}/{path.name} is no list of checksums") from error


def _unreadable(file: Path, error: OSError) -> Exception:
    """Damage, or else something about the machine that the user is to mend."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EIO):
        return DamagedError(f"{file.name} cannot be read: {error.strerror}")
    return ConfigError(f"checkpoint ({file}) must be readable: {error.strerror}")


def _hash(file: Path) -> str:
    digest = xxhash.xxh3_64()
    with file.open("rb") as opened:
        while piece := opened.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
