"""Read a video file into the form of a dataset: which track, which frames, of which size."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.error import FFmpegError
from av.stream import Disposition

from afd_scale.codecs.codec import RejectedError, VideoForm
from afd_scale.config import ConfigError
from afd_scale.data.clips import Frames
from afd_scale.data.display import Track, shown
from afd_scale.data.fields import progressive
from afd_scale.data.headers import read_header

_SAME_RATE = 1e-4  # relative; NTSC's rates are 1e-3 from whole ones
_LATE = 1e-3  # seconds by which a frame may come late
_COARSE_TICK = 0.01  # seconds: gif's. Where ticks are longer, as in avi, they count frames and nothing is rounded
_NO_FILM = Disposition.attached_pic | Disposition.timed_thumbnails


def read_video(path: Path, form: VideoForm) -> Frames:
    """Read the start of a video: frame k is the one shown at k / fps seconds.

    A slower video repeats frames. Frames are shown as the file says (`afd_scale/data/display.py`), cut or padded, and
    resized with anti-aliasing; a video that is already of the form passes through unchanged.

    Args:
        path: any container and codec that FFmpeg reads.
    Returns:
        (T, H, W, C).
    Raises:
        RejectedError: it cannot be read, is damaged in a way that the decoder notices (flipped bits may decode to
            wrong pixels instead), is too short, contradicts itself, or wants to be shown as it is not done here.
    """
    with _opened(path) as (container, track):
        track.stream.thread_type = "AUTO"
        return np.stack([_formed(frame, track, form) for frame in _sampled(container, track, form)])


def check_video(path: Path) -> None:
    """Check that a file is a video as far as its index and its first frame tell.

    Raises:
        RejectedError: it is not, or not all of it is there.
    """
    with _opened(path) as (container, track):
        _first(container, track)


def own_form(path: Path) -> VideoForm:
    """The form that a video has by itself, as far as its timestamps and its first frame tell.

    Raises:
        RejectedError: it cannot be read, contradicts itself, or wants to be shown as it is not done here.
    """
    with _opened(path) as (container, track):
        picture = shown(_first(container, track), track, "rgb24")
    with _opened(path) as (container, track):
        packets = [packet for packet in container.demux(track.stream) if packet.size and not packet.is_discard]
        timed = sorted(_times_of(container, packets), key=lambda packet: packet.pts or 0)
        spans = list(_spans(timed, track))
    count, seconds = len(spans), spans[-1].end if spans else 0.0
    said, tick = float(track.stream.average_rate or 0), float(track.stream.time_base)
    rate = said if said and abs(count / said - seconds) <= max(_LATE, tick) else count / max(seconds, 1e-9)
    try:
        return VideoForm(count, rate, *picture.square)
    except ConfigError as error:
        raise RejectedError(f"{error}, in one form") from error


def same_rate(first: float, second: float) -> bool:
    """Whether two rates are one but for rounding: containers keep them as fractions, each as coarse as it can."""
    return math.isclose(first, second, rel_tol=_SAME_RATE)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Track]]:
    """A container and its film, which is all there as far as its index tells."""
    try:
        if not path.is_file():
            raise RejectedError("must be a readable file: it is not there")
        with av.open(f"file:{path}") as container:  # without the prefix, 12:30.mp4 is taken for a URL
            stream, number = _film(path, container.streams.video)
            # Containers with an index say where their last packet ends; the file must go as far.
            size, least = (
                path.stat().st_size,
                max((entry.pos + entry.size for entry in stream.index_entries), default=0),
            )
            if least > size:
                raise RejectedError(f"must be whole: it is truncated, {size} of at least {least} bytes are there")
            if stream.codec_context is None:
                raise RejectedError("codec must be one that FFmpeg decodes: nothing here does")
            header = read_header(path, container.format.name, stream.id, number)
            end = math.inf
            if "mp4" in container.format.name and stream.duration:  # an edit list may cut the last frame short
                end = float(((stream.start_time or 0) + stream.duration) * stream.time_base)
            alpha = stream.metadata.get("alpha_mode") == "1" and _has_alpha_beside(path, stream)
            yield container, Track(stream, header, stream.codec_context.sample_aspect_ratio, end, alpha)
    except FFmpegError as error:
        raise RejectedError(f"must be a readable video: {error.strerror}") from error
    except OSError as error:
        raise RejectedError(f"must be a readable file: {error.strerror}") from error


def _film(path: Path, streams: Iterable[Any]) -> tuple[Any, int]:
    """The video track that players show, and its number among those that are no covers.

    Tracks of one frame come last, as posters; the one that is marked as default comes first, and then the largest.
    """
    films = [stream for stream in streams if not stream.disposition & _NO_FILM]
    if not films:
        found = "only a still picture, as of a cover" if list(streams) else "no video stream"
        raise RejectedError(f"must be a whole video: {found} is found in it")
    packets = Counter(_packets(path, films)) if len(films) > 1 else Counter()

    def rank(stream: Any) -> tuple[bool, bool, int]:
        area = stream.codec_context.width * stream.codec_context.height if stream.codec_context else 0
        return packets[stream.index] > 1, bool(stream.disposition & Disposition.default), area

    best = max(films, key=rank)
    return best, films.index(best)


def _has_alpha_beside(path: Path, stream: Any) -> bool:
    """Whether a packet brings alpha; what browsers record announces it, and mostly has none."""
    with av.open(f"file:{path}") as container:
        packets = container.demux(container.streams[stream.index])
        return any(packet.has_sidedata("matroska_block_additional") for packet in packets)


def _packets(path: Path, streams: list[Any]) -> Iterator[int]:
    """The tracks of a file's packets."""
    with av.open(f"file:{path}") as container:
        for packet in container.demux([container.streams[stream.index] for stream in streams]):
            if packet.size:
                yield packet.stream_index


def _first(container: Any, track: Track) -> Any:
    frame = next(_frames(container, track), None)
    if frame is None:
        raise RejectedError("must hold frames: it has none")
    return frame


def _frames(container: Any, track: Track) -> Iterator[Any]:
    """All frames, whole ones."""

    def undamaged() -> Iterator[Any]:
        for number, frame in enumerate(_times_of(container, container.decode(track.stream))):
            if frame.is_corrupt:
                raise RejectedError(f"must be undamaged: frame {number} is corrupt")
            yield frame

    return progressive(undamaged(), track.stream, track.header.fields)


def _sampled(container: Any, track: Track, form: VideoForm) -> Iterator[Any]:
    """The frames shown at 0, 1 / fps, ..., as many as the form has."""
    taken, end, tick = 0, 0.0, float(track.stream.time_base)
    for span in _spans(_frames(container, track), track):
        end = span.end
        late = _late_seconds(span.end - span.begin, tick)
        while taken < form.frames and taken / form.fps < end - late:
            yield span.of
            taken += 1
        if taken == form.frames:
            return
    raise RejectedError(f"must last {form.frames / form.fps:g} s ({form.frames} frames at {form.fps:g} a second): "
                        f"it is too short, {end:.3f} s")  # fmt: skip


def _late_seconds(interval: float, tick: float) -> float:
    """By how much the frame after an interval may be late: containers round times to their ticks."""
    rounded = 0.6 * tick if tick <= _COARSE_TICK and interval > 1.5 * tick else 0.0
    return min(max(_LATE, rounded), interval / 4)


@dataclass(frozen=True)
class _Span:
    """When a frame or packet is shown, seconds from the start of the first."""

    of: Any
    begin: float
    end: float


def _spans(items: Iterable[Any], track: Track) -> Iterator[_Span]:
    """When frames are shown, or packets that are in the order of showing: each until the next is.

    Where times are missing, one follows another by its length.
    """
    before, begin, interval, origin = None, 0.0, 0.0, None
    for number, item in enumerate(items):
        time = None if item.pts is None else float(item.pts * (item.time_base or track.stream.time_base))
        if time is None or origin is None:
            counted = 0.0 if before is None else begin + _length(before, track, interval)
            origin = origin if time is None else time - counted
            time = counted
        elif (time := time - origin) <= begin:
            raise RejectedError(
                f"must have increasing times: frame {number} is shown at {time:.3f} s after {begin:.3f} s"
            )
        if before is not None:
            yield _Span(before, begin, time)
        before, begin, interval = item, time, time - begin
    if before is not None:
        last, end = begin + _length(before, track, interval), track.end - (origin or 0.0)
        yield _Span(before, begin, min(last, end) if end > begin else last)


def _length(item: Any, track: Track, interval: float) -> float:
    """Seconds for which a frame is shown that no other follows: its own duration, else that of the one before it."""
    rate = track.stream.average_rate or track.stream.guessed_rate
    if item.duration > 0:
        return float(item.duration * (item.time_base or track.stream.time_base))
    if not interval and not rate:
        raise RejectedError("times must be there: frames have neither times nor durations, and the file has no rate")
    return interval or 1 / float(rate)


def _times_of(container: Any, items: Iterable[Any]) -> Iterator[Any]:
    """Frames or packets, their times of showing set.

    Avi has none, and FFmpeg's guesses are wrong for H.264 with B-frames. What is left is when each is decoded, which
    frames come out in the order of.
    """
    for item in items:
        if container.format.name == "avi":
            item.pts = item.dts
        yield item


def _formed(frame: Any, track: Track, form: VideoForm) -> Frames:
    """(H, W, C) of one frame in its form."""
    picture = shown(frame, track, form.colour)
    return fit(picture.pixels, form, picture.square)


def fit(pixels: Frames, form: VideoForm, square: tuple[int, int] | None = None) -> Frames:
    """Cut, pad or stretch a frame to the form's size.

    Args:
        pixels: (H, W, C).
        square: height and width that it has with square pixels; None where they are.
    Returns:
        (form.height, form.width, C).
    """
    height, width = pixels.shape[:2]
    shown_height, shown_width = square or (height, width)
    if form.aspect == "stretch":
        return _resize(pixels, form.height, form.width)
    scales = (form.height / shown_height, form.width / shown_width)
    if form.aspect == "crop":
        scale = max(scales)
        keep_height = min(height, max(1, round(form.height / scale * height / shown_height)))
        keep_width = min(width, max(1, round(form.width / scale * width / shown_width)))
        top, left = (height - keep_height) // 2, (width - keep_width) // 2
        return _resize(pixels[top : top + keep_height, left : left + keep_width], form.height, form.width)
    scale = min(scales)
    inner_height = max(1, min(form.height, round(shown_height * scale)))
    inner_width = max(1, min(form.width, round(shown_width * scale)))
    canvas = np.zeros((form.height, form.width, pixels.shape[2]), dtype=np.uint8)
    top, left = (form.height - inner_height) // 2, (form.width - inner_width) // 2
    canvas[top : top + inner_height, left : left + inner_width] = _resize(pixels, inner_height, inner_width)
    return canvas


def _resize(pixels: Frames, height: int, width: int) -> Frames:
    if pixels.shape[:2] == (height, width):
        return np.ascontiguousarray(pixels)
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float()
    image = F.interpolate(image, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return image.round_().clamp_(0, 255).to(torch.uint8)[0].permute(1, 2, 0).contiguous().numpy()


def file_fingerprint(path: Path) -> str:
    """Another one when a file was replaced; for a file that is not there, one of its own."""
    try:
        state = path.stat()
    except (OSError, ValueError):
        return "absent"
    return f"{state.st_size}-{state.st_mtime_ns}"
