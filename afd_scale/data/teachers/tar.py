"""Plain members of a tar, by where their bytes lie. Nothing is unpacked, so names of members are never paths."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from afd_scale.codecs.codec import RejectedError
from afd_scale.config import one_line

_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Member:
    """A member whose bytes are all there.

    Attributes:
        tar, begin, size: the file, and the bytes of it.
        name: as the tar has it.
    """

    tar: Path
    name: str
    begin: int
    size: int

    def content(self) -> Iterator[bytes]:
        """Its bytes in parts.

        Raises:
            RejectedError: the tar cannot be read, or has become shorter.
        """
        try:
            with self.tar.open("rb") as file:
                file.seek(self.begin)
                left = self.size
                while left:
                    part = file.read(min(left, _AT_ONCE))
                    if not part:
                        raise RejectedError("must be whole: its tar has become shorter")
                    left -= len(part)
                    yield part
        except OSError as error:
            raise RejectedError(f"must be in a readable tar: {error.strerror}") from error


def read_members(tar: Path) -> tuple[list[Member], list[tuple[str, str]]]:
    """The members of an uncompressed tar, and what is refused: names of members with the reason, "" for the tar itself.

    Links, devices and sparse files are refused. What lies whole before damage is there to be used.
    """
    members: list[Member] = []
    refused: list[tuple[str, str]] = []

    def damaged(why: str) -> tuple[str, str]:
        return "", f"must be a whole, uncompressed tar: {why}; the {len(members)} members before that can be used"

    try:
        size, last = tar.stat().st_size, -1
        with tarfile.open(tar, "r:", encoding="utf-8", errors="surrogateescape") as file:
            while (entry := file.next()) is not None:
                if entry.offset <= last or entry.size < 0 or entry.offset_data + entry.size > size:
                    return members, [*refused, damaged(f"{entry.name!r} reaches beyond its end, byte {size}")]
                last = entry.offset
                if entry.isreg() and not entry.issparse():
                    members.append(Member(tar, entry.name, entry.offset_data, entry.size))
                elif not entry.isdir():
                    refused.append((entry.name, f"must be a plain file: it is {_kind(entry)}"))
            end = file.offset
    except Exception as error:  # a damaged header leads to a dozen kinds
        return members, [*refused, damaged(one_line(error))]
    wrong = _after(tar, end)
    return members, [*refused, damaged(wrong)] if wrong else refused


def _kind(entry: tarfile.TarInfo) -> str:
    if entry.issym() or entry.islnk():
        return "a link"
    return "sparse" if entry.issparse() else "a device" if entry.isdev() else "of another kind"


def _after(tar: Path, end: int) -> str | None:
    """What is wrong where the last member ends; tarfile takes a header that it cannot read for the end."""
    with tar.open("rb") as file:
        file.seek(end)
        mark = file.read(tarfile.BLOCKSIZE)
        if len(mark) < tarfile.BLOCKSIZE:
            return f"it ends at byte {end + len(mark)} without its end mark"
        if mark.strip(b"\0"):
            return f"the header at byte {end} is damaged"
        while part := file.read(_AT_ONCE):
            if part.strip(b"\0"):
                return f"more follows its end mark at byte {end}, as where tars were joined"
    return None
