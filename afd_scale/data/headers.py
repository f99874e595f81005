"""What the headers of mp4 and Matroska files say of a track's picture and PyAV does not pass on.

Sizes in a file are never trusted: a box ends where its parent ends, and a parent has so many children at most.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, Literal

from afd_scale.codecs.codec import RejectedError

_MOST_CHILDREN = 10_000
_MOST_BYTES = 64  # of a value that is read
_SAMPLE_ENTRY = 78  # bytes of a visual sample entry before its boxes

FirstField = Literal["tff", "bff"]  # the top field or the bottom one
_MP4_FIELDS: dict[int, FirstField] = {1: "tff", 6: "bff", 9: "bff", 14: "tff"}
_MATROSKA_FIELDS: dict[int, FirstField] = {1: "tff", 6: "bff", 9: "tff", 14: "bff"}

Span = tuple[int, int]  # first byte, byte after the last
Children = Callable[[BinaryIO, Span], Iterator[tuple[bytes, Span]]]


@dataclass(frozen=True)
class Header:
    """What is said of one track.

    Attributes:
        crop: pixels to cut off at the left, top, right and bottom.
        square: the pixels are, though FFmpeg compares the track's size with one from which nothing is cut.
        fields: which field of a frame is shown first; None where nothing is said, or that there are none.
        dolby_vision: whether it has that.
    """

    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    square: bool = False
    fields: FirstField | None = None
    dolby_vision: bool = False


def read_header(path: Path, container: str, track: int, number: int) -> Header:
    """The header of one video track.

    Args:
        container: FFmpeg's names of the format.
        track: its id; mp4 has them.
        number: of the track among the file's video tracks.
    Raises:
        RejectedError: what it says cannot be.
    """
    with path.open("rb") as file:
        whole = (0, path.stat().st_size)
        if "mp4" in container:
            return _mp4(file, whole, track)
        if "matroska" in container:
            return _matroska(file, whole, number)
    return Header()


def _mp4(file: BinaryIO, whole: Span, track: int) -> Header:
    for trak in _found(_boxes, file, whole, b"moov", b"trak"):
        head = next(_found(_boxes, file, trak, b"tkhd"), None)
        if head is None or _track_id(_bytes(file, head, 24)) != track:
            continue
        _check_edits(file, trak)
        size = struct.unpack(">II", _bytes(file, (max(head[0], head[1] - 8), head[1])).ljust(8, b"\0"))
        table = next(_found(_boxes, file, trak, b"mdia", b"minf", b"stbl", b"stsd"), (0, 0))
        said = {_sample_entry(file, entry, size) for _, entry in _boxes(file, (table[0] + 8, table[1]))}
        if len(said) > 1:
            raise RejectedError("picture must be described once: the sample entries of the track differ")
        return said.pop() if said else Header()
    return Header()


def _check_edits(file: BinaryIO, trak: Span) -> None:
    """FFmpeg applies edits but for their rates: each has a length, a time, and a rate that may be 0, of a still.

    Where the time is -1 nothing is played, at whatever rate.
    """
    for span in _found(_boxes, file, trak, b"edts", b"elst"):
        head = _bytes(file, span, 8)
        width = 20 if head[:1] == b"\1" else 12
        for number in range(min(int.from_bytes(head[4:], "big"), _MOST_CHILDREN)):
            after = span[0] + 8 + width * (number + 1)
            edit = _bytes(file, (after - width, min(after, span[1])))
            time, rate = edit[(width - 4) // 2 : -4], edit[-4:]
            if len(edit) == width and time.strip(b"\xff") and rate != b"\0\1\0\0":
                raise RejectedError(f"edit list (rate {struct.unpack('>i', rate)[0] / 65536:g}) must play at rate 1: "
                                    "others are not applied")  # fmt: skip


def _track_id(head: bytes) -> int:
    """Of a tkhd, whose times are of 8 bytes each in version 1, else of 4."""
    at = 20 if head[:1] == b"\1" else 12
    return int.from_bytes(head[at : at + 4], "big")


def _sample_entry(file: BinaryIO, entry: Span, size: tuple[int, int]) -> Header:
    """Args:
        size: width and height at which the track is shown, in 1/65536 pixels.
    """  # fmt: skip
    begin, end = entry
    width, height = struct.unpack(">HH", _bytes(file, (begin + 24, end), 4).ljust(4, b"\0"))
    boxes = {kind: _bytes(file, span) for kind, span in _boxes(file, (begin + _SAMPLE_ENTRY, end))}
    header = Header(dolby_vision=not boxes.keys().isdisjoint({b"dvcC", b"dvvC", b"dvwC"}))
    fields = boxes.get(b"fiel", b"").ljust(2, b"\0")
    if fields[0] == 2:
        header = replace(header, fields=_MP4_FIELDS.get(fields[1], "tff"))
    if b"clap" not in boxes:
        return header
    crop = _clean_aperture(boxes[b"clap"], width, height)
    left, top, right, bottom = crop
    square = b"pasp" not in boxes and size == ((width - left - right) << 16, (height - top - bottom) << 16)
    return replace(header, crop=crop, square=square)


def _clean_aperture(box: bytes, width: int, height: int) -> tuple[int, int, int, int]:
    """What a `clap` box cuts off. It has, as fractions, the picture's size and how far its centre is from the middle.

    Source: ISO/IEC 14496-12, sec. 12.1.4.
    """
    numbers = struct.unpack(">IIIIiIiI", box[:32].ljust(32, b"\0"))
    if not all(numbers[1::2]):
        raise RejectedError("clean aperture must be of whole fractions: one is divided by 0")
    wide, high, right, down = (Fraction(numbers[at], numbers[at + 1]) for at in (0, 2, 4, 6))
    left, top = (width - wide) / 2 + right, (height - high) / 2 + down
    crop = (round(left), round(top), width - round(left + wide), height - round(top + high))
    if min(crop) < 0 or crop[0] + crop[2] >= width or crop[1] + crop[3] >= height:
        raise RejectedError(f"clean aperture ({float(wide):g} x {float(high):g}) must lie in the picture "
                            f"({width} x {height}): it does not")  # fmt: skip
    return crop


def _matroska(file: BinaryIO, whole: Span, number: int) -> Header:
    tracks = (
        track
        for track in _found(_elements, file, whole, b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\xae")
        if 1 in _numbers(file, track, b"\x83")  # of video
    )
    track = next((track for at, track in enumerate(tracks) if at == number), (0, 0))
    video = next(_found(_elements, file, track, b"\xe0"), (0, 0))
    crop = [max(_numbers(file, video, b"\x54" + side), default=0) for side in (b"\xcc", b"\xbb", b"\xdd", b"\xaa")]
    order = max(_numbers(file, video, b"\x9d"), default=2)
    kinds = [kind for span in _found(_elements, file, track, b"\x41\xe4") for kind in _numbers(file, span, b"\x41\xe7")]
    return Header(
        crop=(crop[0], crop[1], crop[2], crop[3]),
        fields=_MATROSKA_FIELDS.get(order, "tff") if 1 in _numbers(file, video, b"\x9a") else None,
        dolby_vision=any(kind.to_bytes(8, "big")[4:] in (b"dvcC", b"dvvC", b"dvwC") for kind in kinds),
    )


def _found(children: Children, file: BinaryIO, span: Span, *names: bytes) -> Iterator[Span]:
    """All that lie at a path of names."""
    for name, inner in children(file, span):
        if name == names[0]:
            yield from _found(children, file, inner, *names[1:]) if names[1:] else [inner]


def _boxes(file: BinaryIO, span: Span) -> Iterator[tuple[bytes, Span]]:
    """The boxes of an mp4 in another: type, and where its content lies."""
    at, end = span
    for _ in range(_MOST_CHILDREN):
        head = _bytes(file, (at, end), 16)
        if len(head) < 8:
            return
        size, begin = int.from_bytes(head[:4], "big"), at + 8
        if size == 1:
            size, begin = int.from_bytes(head[8:16], "big"), at + 16
        after = end if size == 0 else min(end, at + size)
        if after < begin:
            return
        yield head[4:8], (begin, after)
        at = after


def _elements(file: BinaryIO, span: Span) -> Iterator[tuple[bytes, Span]]:
    """The elements of a Matroska file in another: id, and where its content lies."""
    at, end = span
    for _ in range(_MOST_CHILDREN):
        head = _bytes(file, (at, end), 12)
        id_length = 9 - head[0].bit_length() if head else 9
        size_length = 9 - head[id_length].bit_length() if id_length < len(head) else 9
        begin = at + id_length + size_length
        if max(id_length, size_length) > 8 or begin - at > len(head):
            return
        size = int.from_bytes(head[id_length : begin - at], "big") - (1 << 7 * size_length)
        unknown = size == (1 << 7 * size_length) - 1  # of what was being written: as far as its parent
        after = end if unknown else min(end, begin + size)
        yield head[:id_length], (begin, after)
        at = after


def _numbers(file: BinaryIO, span: Span, name: bytes) -> list[int]:
    """The values of the elements of a name."""
    return [int.from_bytes(_bytes(file, inner, 8), "big") for inner in _found(_elements, file, span, name)]


def _bytes(file: BinaryIO, span: Span, most: int = _MOST_BYTES) -> bytes:
    """The start of what lies there."""
    file.seek(span[0])
    return file.read(max(0, min(most, span[1] - span[0])))
