"""Read a video file into the form of a dataset: which frames, of which size, in which colours."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.error import FFmpegError
from av.video.reformatter import Colorspace, ColorTrc

from afd_scale.codecs.codec import RejectedError, VideoForm
from afd_scale.data.clips import Frames

FPS_LIMITS = (1, 240)  # what metadata may say of a video that people watch
_SAME_RATE = 1e-4  # relative; NTSC's rates are 1e-3 from whole ones
_UNSPECIFIED_COLORSPACE = 2
_HD_HEIGHT = 720  # from here on, colours of unspecified standard are BT.709's


def read_video(path: Path, form: VideoForm) -> Frames:
    """Read the start of a video: frame k is the one shown at k / fps seconds.

    A slower video repeats frames. Frames are turned as their metadata says, cut or padded, and resized with
    anti-aliasing; a video that is already of the form passes through unchanged.

    Args:
        path: any container and codec that FFmpeg reads.
    Returns:
        (T, H, W, C).
    Raises:
        RejectedError: it cannot be read, is damaged in a way that the decoder notices (flipped bits may decode to
            wrong pixels instead), too short, HDR, or contradicts itself.
    """
    with _opened(path) as (container, stream):
        rate = _frame_rate(stream)
        stream.thread_type = "AUTO"
        return np.stack([_pixels(frame, stream, form) for frame in _sampled(container, stream, rate, form)])


def check_video(path: Path) -> None:
    """Check that a file is a video as far as its index and its first frame tell.

    Raises:
        RejectedError: it is not, or not all of it is there.
    """
    with _opened(path) as (container, stream):
        if next(container.decode(stream), None) is None:
            raise RejectedError("must hold frames: it has none")


def own_form(path: Path) -> VideoForm:
    """The form that a video has by itself, as far as its index and its first frame tell.

    Raises:
        RejectedError: it cannot be read, or contradicts itself.
    """
    with _opened(path) as (container, stream):
        rate = _frame_rate(stream)
        frame = next(container.decode(stream), None)
        if frame is None:
            raise RejectedError("must hold frames: it has none")
        seconds = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / av.time_base
        size = (frame.height, round(frame.width * float(stream.sample_aspect_ratio or 1)))
        height, width = size[::-1] if frame.rotation % 180 else size
        return VideoForm(stream.frames or max(1, round(seconds * rate)), float(rate), height, width)


def same_rate(first: float, second: float) -> bool:
    """Whether two rates are one but for rounding: containers keep them as fractions, each as coarse as it can."""
    return math.isclose(first, second, rel_tol=_SAME_RATE)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """A container and its video stream, which is all there as far as its index tells."""
    try:
        if not path.is_file():
            raise RejectedError("must be a readable file: it is not there")
        with av.open(f"file:{path}") as container:  # without the prefix, 12:30.mp4 is taken for a URL
            if not container.streams.video:
                raise RejectedError("must be a whole video: no video stream is found in it")
            stream = container.streams.video[0]
            # Containers with an index say where their last packet ends; the file must go as far.
            end, size = max((entry.pos + entry.size for entry in stream.index_entries), default=0), path.stat().st_size
            if end > size:
                raise RejectedError(f"must be whole: it is truncated, {size} of at least {end} bytes are there")
            yield container, stream
    except FFmpegError as error:
        raise RejectedError(f"must be a readable video: {error.strerror}") from error
    except OSError as error:
        raise RejectedError(f"must be a readable file: {error.strerror}") from error


def _frame_rate(stream: Any) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate
    if rate is None or not FPS_LIMITS[0] <= rate <= FPS_LIMITS[1]:
        said = "none" if rate is None else f"{float(rate):g}"
        raise RejectedError(f"fps ({said}) must be from {FPS_LIMITS[0]} to {FPS_LIMITS[1]}: the metadata is wrong")
    return Fraction(rate)


def _sampled(container: Any, stream: Any, rate: Fraction, form: VideoForm) -> Iterator[Any]:
    """The frames shown at 0, 1 / fps, ..., as many as the form has."""
    taken, shown, begin, last, count = 0, None, 0.0, -1.0, 0
    tolerance = _tolerance_seconds(stream, rate)
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise RejectedError(f"must be undamaged: frame {count} is corrupt")
        time = frame.time if frame.time is not None else count / float(rate)
        begin = time if shown is None else begin
        time -= begin
        if time <= last:
            raise RejectedError(
                f"must have increasing times: frame {count} is shown at {time:.3f} s after {last:.3f} s"
            )
        while shown is not None and taken < form.frames and taken / form.fps < time - tolerance:
            yield shown
            taken += 1
        if taken == form.frames:
            break
        shown, last, count = frame, time, count + 1
    _check_times(count, last, rate)
    end = last + 1 / float(rate) if shown is not None else 0.0
    while taken < form.frames and taken / form.fps < end - tolerance:
        yield shown
        taken += 1
    if taken < form.frames:
        raise RejectedError(f"must last {form.frames / form.fps:g} s ({form.frames} frames at {form.fps:g} a second): "
                            f"it is too short, {end:.3f} s")  # fmt: skip


def _tolerance_seconds(stream: Any, rate: Fraction) -> float:
    """By how much a frame may be late: containers round times to their ticks, gif's are 10 ms and webm's 1 ms.

    Where a tick is about a frame, as in avi, frames are counted and nothing is rounded.
    """
    tick = stream.time_base
    return max(1e-3, 0.6 * float(tick)) if tick * rate < 0.5 else 1e-3


def _check_times(count: int, last: float, rate: Fraction) -> None:
    """Where frames are timed otherwise than the metadata says, one of them is wrong, and nobody knows which."""
    if count > 1 and not 0.5 < (measured := (count - 1) / last) / float(rate) < 2:
        raise RejectedError(f"fps ({float(rate):g}) must be what its frames are timed at, {measured:g}: "
                            "the metadata is wrong")  # fmt: skip


def _pixels(frame: Any, stream: Any, form: VideoForm) -> Frames:
    """(H, W, C) of one frame in its form."""
    if frame.color_trc in (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67):
        raise RejectedError(f"colours ({ColorTrc(frame.color_trc).name}) must be SDR: HDR needs tone mapping first")
    unspecified = frame.colorspace == _UNSPECIFIED_COLORSPACE
    source = Colorspace.ITU709 if unspecified and frame.height >= _HD_HEIGHT else None
    pixels = frame.reformat(format=form.colour, src_colorspace=source).to_ndarray()
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    ratio = stream.sample_aspect_ratio or 1
    if not 0.1 <= ratio <= 10:
        raise RejectedError(
            f"pixels ({float(ratio):g} times as wide as high) must be nearly square: the metadata is wrong"
        )
    square = (pixels.shape[0], round(pixels.shape[1] * float(ratio)))
    return fit(np.rot90(pixels, frame.rotation // 90), form, square[::-1] if frame.rotation % 180 else square)


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
