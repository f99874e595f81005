"""What OpenCV does: sizes, colours, optical flow, and frames moved along it."""

from collections.abc import Callable
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from afd_scale.mp4 import FrameArray

FloatArray = NDArray[np.float32]
Flow = Callable[[FrameArray, FrameArray], FloatArray]

# Rows of the frames that flow is computed on. DIS matches patches of 8 pixels: it needs more than a toy clip has, and
# on more than this it costs without seeing better what moves.
FLOW_ROWS = (128, 256)


def _cv2() -> ModuleType:
    import cv2  # for those who look at motion; it takes its own time to load

    return cv2


def one_thread_each() -> None:
    """Of a process beside others that do the same."""
    _cv2().setNumThreads(1)


def with_flow_rows(frames: FrameArray) -> FrameArray:
    """Frames (T, H, W[, 3]) with as many rows as flow is computed on; the aspect ratio stays."""
    cv2 = _cv2()
    height, width = frames.shape[1:3]
    rows = int(np.clip(height, *FLOW_ROWS))
    if rows == height:
        return frames
    size = (max(8, round(width * rows / height)), rows)
    how = cv2.INTER_AREA if rows < height else cv2.INTER_CUBIC
    return np.stack([cv2.resize(frame, size, interpolation=how) for frame in frames])


def luma(frame: FrameArray) -> FrameArray:
    """(H, W) of a frame (H, W[, 1 or 3])."""
    if frame.ndim == 2 or frame.shape[-1] == 1:
        return np.ascontiguousarray(frame.reshape(frame.shape[:2]))
    grey: FrameArray = _cv2().cvtColor(frame, _cv2().COLOR_RGB2GRAY)
    return grey


def picture(frame: FrameArray, lossless: bool) -> bytes:
    """A frame (H, W[, 1 or 3]) as a PNG, or a JPEG that cannot be told from it by eye."""
    cv2 = _cv2()
    colours = frame[..., ::-1] if frame.ndim == 3 and frame.shape[-1] == 3 else frame  # OpenCV's are BGR
    kind = (".png", []) if lossless else (".jpg", [cv2.IMWRITE_JPEG_QUALITY, 92])
    done, encoded = cv2.imencode(kind[0], np.ascontiguousarray(colours), kind[1])
    assert done, "OpenCV writes these two of any 8-bit frame"
    return bytes(encoded)


def pixels_of(encoded: bytes) -> FrameArray:
    """The (H, W, 3) frame of a `picture`."""
    cv2 = _cv2()
    frame: FrameArray = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    return frame


def lab(frame: FrameArray) -> FloatArray:
    """(H, W, 3) in CIE L*a*b*: lightness 0 to 100, and two axes of colour, 0 of grey. A step of 1 is just seen."""
    cv2 = _cv2()
    rgb = frame if frame.ndim == 3 and frame.shape[-1] == 3 else np.repeat(luma(frame)[..., None], 3, axis=-1)
    converted: FloatArray = cv2.cvtColor(rgb.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    converted[np.ptp(rgb, axis=-1) == 0, 1:] = 0  # OpenCV gives grey up to 0.03
    return converted


def make_flow() -> Flow:
    """Dense inverse search: from two (H, W) frames to (H, W, 2), where each pixel of the first is in the second.

    Source: Kroeger et al., arXiv:1603.03590; OpenCV's medium preset.
    """
    cv2 = _cv2()
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def flow(first: FrameArray, second: FrameArray) -> FloatArray:
        found: FloatArray = search.calc(first, second, None)
        return found

    return flow


def along(flow: FloatArray, values: FrameArray | FloatArray) -> FloatArray:
    """Values (H, W[, C]) of the second frame of a flow, where the pixels of the first have gone."""
    cv2 = _cv2()
    rows, columns = np.indices(flow.shape[:2], dtype=np.float32)
    places = (columns + flow[..., 0], rows + flow[..., 1])
    moved: FloatArray = cv2.remap(values.astype(np.float32), *places, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    return moved


def shrunk(frame: FrameArray, longest: int) -> FrameArray:
    """A frame (H, W) whose longer side has at most so many pixels; the aspect ratio stays."""
    height, width = frame.shape
    scale = longest / max(height, width)
    if scale >= 1:
        return frame
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    smaller: FrameArray = _cv2().resize(frame, size, interpolation=_cv2().INTER_AREA)
    return smaller


def blurred(values: FloatArray, side: int) -> FloatArray:
    """Means (H, W) over squares of so many pixels a side."""
    means: FloatArray = _cv2().blur(values, (side, side), borderType=_cv2().BORDER_REFLECT)
    return means
