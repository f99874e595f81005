"""What a video says of how it is shown: each thing is applied, or the video is refused by its name.

`REFUSED` and `APPLIED` are the whole list, but for the choice of the track (`afd_scale/data/video.py`) and
interlacing (`afd_scale/data/fields.py`), which come before.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from av.sidedata.sidedata import Type

from afd_scale.codecs.codec import RejectedError
from afd_scale.data import colours
from afd_scale.data.clips import Frames
from afd_scale.data.filters import graph_for
from afd_scale.data.headers import Header

_HDR_SIDE_DATA = ("DOVI_RPU_BUFFER", "DOVI_METADATA", "DYNAMIC_HDR_PLUS", "DYNAMIC_HDR_VIVID")
# Kinds that FFmpeg has and PyAV does not, EXIF among them: its orientation comes as a display matrix, too.
_UNNAMED = range(len(Type), 64)
_ONE_EYE = 0  # of AVStereo3DType
_RECTILINEAR = 4  # of AVSphericalProjection
_RATIOS = (0.1, 10)
_SLANT = 1 / 256  # of what is called a quarter turn; tools write 0


@dataclass(frozen=True)
class Track:
    """A video track that is read.

    Attributes:
        stream: PyAV's.
        header: what that does not tell.
        shape: the codec's word on the shape of pixels when the file was opened.
        end: after which nothing of it is shown, seconds.
        alpha_beside: whether there are pictures of its transparency beside it, as WebM has them.
    """

    stream: Any
    header: Header
    shape: Fraction | None
    end: float
    alpha_beside: bool = False


@dataclass(frozen=True)
class Said:
    """What is said of one frame.

    Attributes:
        frame: PyAV's.
        side_data: FFmpeg's, by its names.
    """

    frame: Any
    side_data: dict[str, bytes]
    track: Track


@dataclass(frozen=True)
class Picture:
    """A frame on its way.

    Attributes:
        pixels: (H, W, C).
        square: height and width that it has with square pixels.
    """

    pixels: Frames
    square: tuple[int, int]


def shown(frame: Any, track: Track, colour: str) -> Picture:
    """A frame as the file wants it to be shown.

    Args:
        colour: see `VideoForm`.
    Raises:
        RejectedError: it wants what is not done here.
    """
    said = Said(frame, _side_data(frame), track)
    for refuse in REFUSED:
        refuse(said)
    picture = Picture(colours.pixels_of(frame, colour), (frame.height, frame.width))
    for apply in APPLIED:
        picture = apply(picture, said)
    return picture


def _side_data(frame: Any) -> dict[str, bytes]:
    try:
        known = frame.side_data
    except ValueError:  # PyAV 18 gives none of it where it does not know one
        graph = graph_for(frame, *(("sidedata", f"mode=delete:type={kind}") for kind in _UNNAMED))
        graph.vpush(frame)
        known = graph.vpull().side_data
    return {item.type.name: bytes(item) for item in known}


def dynamic_hdr(said: Said) -> None:
    """HDR that is said beside the picture; its transfer function says the rest."""
    found = [name for name in _HDR_SIDE_DATA if name in said.side_data]
    if said.track.header.dolby_vision or found:
        name = "Dolby Vision" if said.track.header.dolby_vision or "DOVI" in found[0] else found[0]
        raise RejectedError(f"colours ({name}) must be SDR: HDR needs tone mapping first")


def stereo(said: Said) -> None:
    """Two pictures, one for each eye."""
    mode = said.track.stream.metadata.get("stereo_mode", "mono")
    if mode != "mono" or _kind(said, "STEREO3D", _ONE_EYE) != _ONE_EYE:
        raise RejectedError(f"picture ({'stereo 3D' if mode == 'mono' else mode}) must be for one eye: it is for two")


def spherical(said: Said) -> None:
    """A picture around the viewer."""
    if _kind(said, "SPHERICAL", _RECTILINEAR) != _RECTILINEAR:
        raise RejectedError("picture (spherical) must be flat: players show a part of it at a time")


def _kind(said: Said, name: str, default: int) -> int:
    """The enumeration with which FFmpeg's struct begins."""
    return int.from_bytes(said.side_data[name][:4], "little") if name in said.side_data else default


def lost_alpha(said: Said) -> None:
    """Transparency that the decoder drops, as those of VP8 and VP9 do."""
    if said.track.alpha_beside and not _has_alpha(said.frame):
        codec = said.track.stream.codec_context.name
        raise RejectedError(f"alpha (of {codec} in WebM) must be decoded: what is transparent would be shown")


def over_black(picture: Picture, said: Said) -> Picture:
    """What is transparent lies over black."""
    if not _has_alpha(said.frame):
        return picture
    alpha = said.frame.reformat(format="rgba").to_ndarray()[..., 3:].astype(np.uint16)
    return replace(picture, pixels=((picture.pixels * alpha + 127) // 255).astype(np.uint8))


def _has_alpha(frame: Any) -> bool:
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def cropping(picture: Picture, said: Said) -> Picture:
    """Cut off what the container says is no part of the picture; the decoder has done so for the codec."""
    left, top, right, bottom = said.track.header.crop
    height, width = picture.pixels.shape[:2]
    if left + right >= width or top + bottom >= height:
        raise RejectedError(f"cropping (left {left}, top {top}, right {right}, bottom {bottom}) must leave something "
                            f"of {width} x {height} pixels: it does not")  # fmt: skip
    return replace(picture, pixels=picture.pixels[top : height - bottom, left : width - right])


def pixel_shape(picture: Picture, said: Said) -> Picture:
    """Pixels are as wide as the container says, else the codec."""
    track = said.track
    now = track.stream.codec_context.sample_aspect_ratio
    if track.shape and now and now != track.shape:
        raise RejectedError(f"pixels must keep their shape: it changes from {track.shape} to {now}")
    ratio = 1.0 if track.header.square else float(track.stream.sample_aspect_ratio or now or 1)
    if not _RATIOS[0] <= ratio <= _RATIOS[1]:
        raise RejectedError(f"pixels ({ratio:g} times as wide as high) must be nearly square: the metadata is wrong")
    height, width = picture.pixels.shape[:2]
    return replace(picture, square=(height, max(1, round(width * ratio))))


def orientation(picture: Picture, said: Said) -> Picture:
    """Turn and mirror by the display matrix: what is at column x and row y comes to a x + c y and b x + d y."""
    numbers = np.frombuffer(said.side_data.get("DISPLAYMATRIX", b""), np.int32).tolist()
    if len(numbers) < 9 or not any(numbers[at] for at in (0, 1, 3, 4)):  # some writers leave it at zeros
        return picture
    (a, b, u), (c, d, v), w = numbers[0:3], numbers[3:6], numbers[8]
    upright, turned = min(abs(a), abs(d)), min(abs(b), abs(c))
    slant = min(max(abs(b), abs(c)) / (upright or 1), max(abs(a), abs(d)) / (turned or 1))
    if u or v or w <= 0 or upright == turned or slant > _SLANT:
        said_matrix = " ".join(f"{number / 65536:g}" for number in (a, b, c, d))
        raise RejectedError(f"orientation ({said_matrix}) must be of quarter turns and mirrors: others are not applied")
    if upright > turned:
        return replace(picture, pixels=picture.pixels[:: _step(d), :: _step(a)])
    return Picture(picture.pixels.swapaxes(0, 1)[:: _step(b), :: _step(c)], picture.square[::-1])


def _step(direction: int) -> int:
    return 1 if direction > 0 else -1


REFUSED: tuple[Callable[[Said], None], ...] = (
    lambda said: colours.transfer(said.frame),
    lambda said: colours.matrix(said.frame),
    lambda said: colours.primaries(said.frame),
    dynamic_hdr,
    stereo,
    spherical,
    lost_alpha,
)
APPLIED: tuple[Callable[[Picture, Said], Picture], ...] = (over_black, cropping, pixel_shape, orientation)
