"""What a video says of its colours: applied, or refused by its name."""

from functools import cache
from typing import Any

import numpy as np
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc
from numpy.typing import NDArray

from afd_scale.codecs.codec import RejectedError
from afd_scale.data.clips import Frames

_HD_HEIGHT = 720  # from here on, colours of unspecified standard are BT.709's
_HDR = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)
_NOT_OF_A_DISPLAY = (ColorTrc.LINEAR, ColorTrc.LOG, ColorTrc.LOG_SQRT, ColorTrc.SMPTE428)
_RGB, _UNSPECIFIED_MATRIX = 0, 2  # of AVColorSpace
_MATRICES = {1, _UNSPECIFIED_MATRIX, 4, 5, 6, 7, 9}  # those that swscale has
_OTHER_MATRICES = {_RGB: "RGB", 8: "YCgCo", 10: "BT2020_CL", 11: "SMPTE2085", 12: "CHROMA_DERIVED_NCL",
                   13: "CHROMA_DERIVED_CL", 14: "ICtCp", 15: "IPT_C2", 16: "YCgCo_RE", 17: "YCgCo_RO"}  # fmt: skip
_OTHER_PRIMARIES = (ColorPrimaries.BT470M, ColorPrimaries.FILM, ColorPrimaries.SMPTE428, ColorPrimaries.SMPTE431)
_BT709 = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))  # x, y of red, green and blue; all have the white of D65
_WIDE = {
    ColorPrimaries.BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    ColorPrimaries.SMPTE432: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
_D65 = (0.3127, 0.3290)
_DISPLAY_GAMMA = 2.4  # BT.1886


def transfer(frame: Any) -> None:
    """Refuse what is no picture for an ordinary display."""
    if frame.color_trc in _HDR:
        raise RejectedError(f"colours ({ColorTrc(frame.color_trc).name}) must be SDR: HDR needs tone mapping first")
    if frame.color_trc in _NOT_OF_A_DISPLAY:
        raise RejectedError(f"colours ({ColorTrc(frame.color_trc).name}) must be a display's: they need grading first")


def matrix(frame: Any) -> None:
    """Refuse a conversion to RGB that swscale would do by another matrix."""
    coloured = len(frame.format.components) > 2 and not frame.format.is_rgb
    said = _said_matrix(frame)
    if coloured and said not in _MATRICES:
        name = _OTHER_MATRICES.get(said, said)
        raise RejectedError(f"colour matrix ({name}) must be of BT.601, BT.709, BT.2020, FCC or SMPTE 240M: "
                            "others are not converted")  # fmt: skip


def _said_matrix(frame: Any) -> int:
    """The frame's matrix. Where colours are coarser than brightness, RGB is what an encoder leaves at 0."""
    coarse = frame.format.chroma_width(frame.width) < frame.width
    return _UNSPECIFIED_MATRIX if frame.colorspace == _RGB and coarse else int(frame.colorspace)


def primaries(frame: Any) -> None:
    """Refuse those that are neither near BT.709's nor converted."""
    if frame.color_primaries in _OTHER_PRIMARIES:
        name = ColorPrimaries(frame.color_primaries).name
        raise RejectedError(f"colour primaries ({name}) must be of BT.709, BT.601, BT.2020 or Display P3: "
                            "others are not converted")  # fmt: skip


def pixels_of(frame: Any, colour: str) -> Frames:
    """(H, W, C) by the frame's matrix and range, its primaries brought to BT.709's.

    Args:
        colour: see `VideoForm`. Grey stays as it is: all primaries have the same white.
    """
    source = None
    if _said_matrix(frame) == _UNSPECIFIED_MATRIX:
        source = Colorspace.ITU709 if frame.height >= _HD_HEIGHT else Colorspace.ITU601
    pixels = frame.reformat(format=colour, src_colorspace=source).to_ndarray()
    if colour == "rgb24" and frame.color_primaries in _WIDE:
        light = np.linspace(0, 1, 256, dtype=np.float32)[pixels] ** _DISPLAY_GAMMA @ _to_bt709(frame.color_primaries).T
        pixels = np.rint(255 * light.clip(0, 1) ** (1 / _DISPLAY_GAMMA)).astype(np.uint8)
    return pixels.reshape(*pixels.shape[:2], -1)


@cache
def _to_bt709(wide: int) -> NDArray[np.float32]:
    """(3, 3) from linear RGB to linear RGB."""
    return (np.linalg.inv(_to_xyz(_BT709)) @ _to_xyz(_WIDE[ColorPrimaries(wide)])).astype(np.float32)


def _to_xyz(places: tuple[tuple[float, float], ...]) -> NDArray[np.float64]:
    """(3, 3) from linear RGB to XYZ, of primaries at places of the chromaticity diagram."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in places]).T
    white = (_D65[0] / _D65[1], 1, (1 - sum(_D65)) / _D65[1])
    return columns * np.linalg.solve(columns, white)
