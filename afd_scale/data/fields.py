"""Interlaced video: frames woven of two fields, each of which is shown at a time of its own."""

from collections.abc import Iterator
from itertools import chain, groupby
from typing import Any

from av.error import BlockingIOError as NothingYet
from av.error import EOFError as NothingMore

from afd_scale.codecs.codec import RejectedError
from afd_scale.data.filters import graph_for
from afd_scale.data.headers import FirstField

_STREAM_FIELDS: dict[int, FirstField] = {2: "tff", 3: "bff", 4: "bff", 5: "tff"}  # of AVFieldOrder
_FIELDS_AS_FRAMES = ("hevc",)  # decoders that give each field as a frame


def progressive(frames: Iterator[Any], stream: Any, header: FirstField | None) -> Iterator[Any]:
    """The frames at their times; from the first interlaced one on, each is made whole from its earlier field.

    Frames that say of themselves whether they are interlaced are believed. Where the first does not but the container
    says that all are, they are.

    Args:
        header: what the container says of the order of fields.
    Raises:
        RejectedError: fields lie in a way that is not handled.
    """
    container = header or _STREAM_FIELDS.get(stream.codec_context.field_order)
    woven = settings = None

    def looks(frame: Any) -> tuple[Any, ...]:
        nonlocal woven, settings
        if frame.interlaced_frame and stream.codec_context.name in _FIELDS_AS_FRAMES:
            raise RejectedError(f"fields (of {stream.codec_context.name}) must be woven into frames: each is a frame")
        if settings is None and frame.interlaced_frame:
            settings = "deint=interlaced:parity=auto"
        elif woven is None and container:
            settings = f"deint=all:parity={container}"
        woven = settings is not None
        return woven, frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range

    for (interlaced, *_), group in groupby(frames, looks):
        if interlaced:
            yield from _deinterlaced(group, str(settings))
        else:
            yield from group


def _deinterlaced(frames: Iterator[Any], settings: str) -> Iterator[Any]:
    """Frames of one size and format, through FFmpeg's bwdif."""
    first = next(frames)
    second = next(frames, first)
    graph = graph_for(first, ("bwdif", f"mode=send_frame:{settings}"))
    # Motion is seen from the frames on both sides, so the second lies before the first too; it is not given back.
    pulled = 0
    for frame in chain([second, first], [second] if second is not first else [], frames, [None]):
        graph.vpush(frame)
        while True:
            try:
                whole = graph.vpull()
            except (NothingYet, NothingMore):
                break
            if pulled:
                yield whole
            pulled += 1
