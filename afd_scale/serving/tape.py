"""The pictures of a stream as they are sent, the last of which are kept for an mp4."""

import io
from collections import deque

from afd_scale.mp4 import FrameArray, encoding_mp4
from afd_scale.vision import picture, pixels_of

_LOSSLESS_PIXELS = 128 * 128  # of a frame; larger ones are sent as JPEG
_MOST_BYTES = 256 * 1024**2


class Tape:
    """The last frames of one stream.

    Args:
        seconds: that are kept, as far as they have no more than 256 MiB.
    """

    def __init__(self, fps: float, size: tuple[int, int], seconds: float):
        self.lossless = size[0] * size[1] <= _LOSSLESS_PIXELS
        self._frames = max(1, round(seconds * fps))
        self._pictures: deque[bytes] = deque()
        self._bytes = 0

    @property
    def media_type(self) -> str:
        """Of the pictures."""
        return "image/png" if self.lossless else "image/jpeg"

    def pictures(self, frames: FrameArray) -> list[bytes]:
        """Of (t, H, W, C) frames; on any thread, and they are not kept yet."""
        return [picture(frame, self.lossless) for frame in frames]

    def keep(self, pictures: list[bytes]) -> None:
        """Keep the next ones, let go of the oldest."""
        self._pictures += pictures
        self._bytes += sum(map(len, pictures))
        while len(self._pictures) > self._frames or self._bytes > _MOST_BYTES:
            self._bytes -= len(self._pictures.popleft())

    def kept(self) -> list[bytes]:
        """The pictures that are kept at this moment."""
        return list(self._pictures)


def mp4_of(pictures: list[bytes], fps: float) -> bytes:
    """A video of the pictures of a tape."""
    target = io.BytesIO()
    with encoding_mp4(target, fps) as write:
        for kept in pictures:
            write(pixels_of(kept)[None])
    return target.getvalue()
