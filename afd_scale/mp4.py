"""H.264 videos that every browser plays, into a file or into memory."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from numpy.typing import NDArray

FrameArray = NDArray[np.uint8]

# x264's constant quality; 16 cannot be told from the source by eye.
CRF = "16"
# Of a rate: that of NTSC's, 24000/1001, 30000/1001 and 60000/1001.
_DENOMINATOR = 1001

# What x264 decides by frames to come differs now and then, in up to some encodings of a hundred (PyAV 18.1).
REPEATABLE = {"preset": "veryfast", "x264-params": "mbtree=0:rc-lookahead=0:bframes=0"}


@contextmanager
def encoding_mp4(
    target: Path | BinaryIO, fps: float, title: str = "", comment: str = "", repeats: bool = False
) -> Iterator[Callable[[FrameArray], None]]:
    """Encode one video (yuv420p) frame by frame.

    Args:
        target: a file, or what can be written and sought.
        fps: frames per second.
        title, comment: kept in the file.
        repeats: the same frames give the same bytes, by one thread that looks at no later frame; also it is fast.
    Yields:
        Takes the next frames, uint8 (F, H, W), (F, H, W, 1) or (F, H, W, 3). An odd height or width gains one repeated
        row or column.
    """
    with av.open(target, "w", format="mp4") as container:
        container.metadata.update({"title": title, "comment": comment})
        rate = Fraction(fps).limit_denominator(_DENOMINATOR)
        stream = container.add_stream("libx264", rate=rate, options={"crf": CRF, **(REPEATABLE if repeats else {})})
        stream.pix_fmt, stream.thread_count = "yuv420p", int(repeats)

        def write(frames: FrameArray) -> None:
            video = _even(coloured(frames, 4))
            if not stream.codec_context.is_open:
                stream.height, stream.width = video.shape[1:3]
            for frame in video:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))

        yield write
        container.mux(stream.encode(None))


def mp4_bytes(frames: FrameArray, fps: float) -> bytes:
    """One video, the same bytes each time."""
    target = io.BytesIO()
    with encoding_mp4(target, fps, repeats=True) as write:
        write(frames)
    return target.getvalue()


def coloured(frames: FrameArray, ndim: int) -> FrameArray:
    """Repeat grey frames into three channels; `ndim` counts the axes with the channels."""
    if frames.dtype == np.uint8 and frames.size:
        if frames.ndim == ndim - 1:
            return np.repeat(frames[..., None], 3, axis=-1)
        if frames.ndim == ndim and frames.shape[-1] == 1:
            return np.repeat(frames, 3, axis=-1)
        if frames.ndim == ndim and frames.shape[-1] == 3:
            return frames
    axes = ("N, " if ndim == 5 else "") + "F, H, W"
    raise ValueError(
        f"frames ({frames.dtype} {frames.shape}) must be uint8 ({axes}) or ({axes}, 3), not empty: "
        "grey or RGB pixels are written"
    )


def _even(frames: FrameArray) -> FrameArray:
    """yuv420p halves the chroma planes: repeat the last row or column of an odd size; (F, H, W, 3)."""
    height, width = frames.shape[1:3]
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
