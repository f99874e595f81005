"""Trivial traits of a clip: few numbers, of no motion and no physics, by which it might be recognised.

Spatial traits are of a few frames at the clip's own size; those of time are of all frames, shrunk.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from afd_scale.mp4 import FrameArray
from afd_scale.vision import FloatArray, blurred, luma, shrunk

LEAST_FRAMES = 3
LOOKED_AT = 8  # frames of a clip at its own size
SMALL = 96  # pixels of the longer side of a shrunk frame
SIDES = ("top", "bottom", "left", "right")
PARTS = 4  # of a clip's time
GRID = 8  # blocks of a frame along a side
CHANNELS = ("red", "green", "blue")

LEVEL = 0.1  # of 255, added before a logarithm: below, differences are rounding
_BLACK = 24  # luma of the brightest pixel of a bar; compressed black is not quite 0
_WIDEST_BAR = 4  # a bar is at most this part of a side: beyond, it is a dark picture
_BEGUN = 0.05  # of the motion of a clip has been when it has begun
_NEIGHBOURHOOD = 5  # pixels of a shrunk frame around one that stands out


@dataclass(frozen=True)
class Traits:
    """Of one clip.

    Attributes:
        values: by probe and name; lengths in pixels, brightness of 255, the names that say so are logarithms.
        still: (h, w) of a shrunk frame in [-1, 1]: how far a pixel stands out from its neighbourhood all the time, up
            or down; 0 where what is seen there changes.
        bars: black lines at each of `SIDES`.
        shape: frames, height, width and channels.
    """

    values: Mapping[str, Mapping[str, float]]
    still: FloatArray
    bars: tuple[int, ...]
    shape: tuple[int, int, int, int]


def traits_of(clip: FrameArray) -> Traits:
    """Measure one clip.

    Args:
        clip: uint8 (T, H, W), (T, H, W, 1) or (T, H, W, 3), T >= 3, H and W >= 4.
    Raises:
        ValueError: another shape or type.
    """
    frames = clip[..., None] if clip.ndim == 3 else clip
    usable = frames.ndim == 4 and frames.shape[-1] in (1, 3) and len(frames) >= LEAST_FRAMES
    if clip.dtype != np.uint8 or not usable or min(frames.shape[1:3]) < 4:
        raise ValueError(f"clip ({clip.dtype} {clip.shape}) must be uint8 (T, H, W), or with 1 or 3 colours, of "
                         f"{LEAST_FRAMES} frames and 4 x 4 pixels or more: it has borders and an inside")  # fmt: skip
    chosen = np.unique(np.linspace(0, len(frames) - 2, LOOKED_AT).round().astype(int))
    looked_at = frames[chosen]
    grey = np.stack([luma(frame) for frame in looked_at]).astype(np.float32)
    following = np.stack([luma(frame) for frame in frames[chosen + 1]]).astype(np.float32)
    small = np.stack([shrunk(luma(frame), SMALL) for frame in frames]).astype(np.float32)
    return Traits(
        values={
            "colour": _colour(looked_at),
            "sharpness": _sharpness(grey),
            "noise": _noise(grey, following),
            "compression": _compression(looked_at, grey, following),
            "borders": _borders(grey),
            "first frame": _first_frame(frames[:2], small),
            "timing": _timing(small),
        },
        still=_still(small),
        bars=_bars(grey),
        shape=(len(frames), *frames.shape[1:3], frames.shape[3]),
    )


def _colour(frames: FrameArray) -> dict[str, float]:
    """Means and standard deviations of the channels."""
    values, levels = {}, np.arange(256)
    for place, name in enumerate(CHANNELS if frames.shape[-1] == 3 else ("grey",)):
        share = np.bincount(frames[..., place].ravel(), minlength=256) / frames[..., place].size
        values[name] = float(share @ levels)
        values[f"{name} spread"] = math.sqrt(float(share @ (levels - values[name]) ** 2))
    return values


def _sharpness(grey: FloatArray) -> dict[str, float]:
    """Logarithms of the usual block: how fine edges are, second over first differences; how steep, over contrast."""
    return {"fine": _fineness(grey), "steep": _usual(_slopes(grey, 1), _deviations(grey), _slopes(grey, 1))}


def _fineness(frames: FloatArray) -> float:
    return _usual(_slopes(frames, 2), _slopes(frames, 1), _slopes(frames, 1))


def _slopes(frames: FloatArray, order: int) -> FloatArray:
    """(T, h, w) root mean square of differences of blocks, both ways, first or second ones of the same places."""
    height, width = frames.shape[1] - 2, frames.shape[2] - 2
    down, right = (np.diff(frames, n=order, axis=axis)[:, :height, :width] for axis in (1, 2))
    return np.asarray(np.sqrt(_blocks(np.square(down) + np.square(right))))


def _deviations(frames: FloatArray) -> FloatArray:
    """(T, h, w) standard deviations of the same blocks."""
    frames = frames[:, :-2, :-2]
    return np.asarray(np.sqrt(np.maximum(_blocks(np.square(frames)) - np.square(_blocks(frames)), 0)))


def _usual(first: FloatArray, second: FloatArray, weight: FloatArray) -> float:
    """Log of the ratio that half of the weight is below; a sign in a corner or a black border does not change it."""
    ratios = np.log((first + LEVEL) / (second + LEVEL)).ravel()
    order = np.argsort(ratios)
    below = np.cumsum(weight.ravel()[order] + 1e-9)
    return float(ratios[order][np.searchsorted(below, below[-1] / 2)])


def _blocks(values: FloatArray) -> FloatArray:
    """(T, GRID, GRID) means of the blocks of (T, H, W), fewer where that is smaller; lines over are left out."""
    side = [max(1, size // GRID) for size in values.shape[1:]]
    height, width = (min(GRID, size // part) for size, part in zip(values.shape[1:], side, strict=True))
    cut = values[:, : height * side[0], : width * side[1]]
    return np.asarray(cut.reshape(len(cut), height, side[0], width, side[1]).mean(axis=(2, 4)))


def _noise(grey: FloatArray, following: FloatArray) -> dict[str, float]:
    """Logarithms of what is left of quiet places: the blocks that change least from frame to frame, and the flattest.

    In space it is what the two second differences leave, which are 0 of slopes and edges; Immerkaer, 1996. Of the
    usual frame: some may repeat the one before.
    """
    across = np.diff(np.diff(grey, n=2, axis=1), n=2, axis=2)
    return {"in time": _quietest(np.abs(following - grey)), "in space": _quietest(np.abs(across))}


def _quietest(values: FloatArray) -> float:
    blocks = np.sort(_blocks(values).reshape(len(values), -1), axis=1)
    return math.log(float(np.median(blocks[:, : max(1, blocks.shape[1] // 4)].mean(axis=1))) + LEVEL)


def _compression(frames: FrameArray, grey: FloatArray, following: FloatArray) -> dict[str, float]:
    """Steps at borders of blocks of 8, repeated pixels among those that hardly change, colours coarser than luma."""
    steps = []
    for axis in (1, 2):
        across = np.median(np.abs(np.diff(grey, axis=axis)).mean(axis=3 - axis), axis=0)
        at_border = np.arange(1, len(across) + 1) % 8 == 0
        if at_border.sum() >= 3:
            steps.append(_ratio(float(np.median(across[at_border])), float(np.median(across[~at_border]))))
    change = np.abs(following - grey)
    repeated = [float((pair[pair < 1.5] == 0).mean()) for pair in change if (pair < 1.5).any()]
    values = {
        "blocks": float(np.mean(steps)) if steps else 0.0,
        "repeated": float(np.median(repeated)) if repeated else 0.0,
        "coarse colours": 0.0,
    }
    if frames.shape[-1] == 3:
        values["coarse colours"] = _fineness(grey) - _fineness(frames[..., 0].astype(np.float32) - frames[..., 2])
    return values


def _borders(grey: FloatArray) -> dict[str, float]:
    """Of a strip at each side: its outermost line against what is beside it, its level against the frame's, its
    spread."""
    level, values = float(grey.mean()), {}
    for side in SIDES:
        lines = _from_side(grey, side)
        width = strip_width(lines.shape[1])
        strip = lines[:, :width]
        values[f"{side} step"] = float(lines[:, 0].mean() - lines[:, width : width + 1].mean())
        values[f"{side} level"] = float(strip.mean()) - level
        values[f"{side} spread"] = math.log(float(strip.std()) + 1)
    return values


def strip_width(size: int) -> int:
    """Lines of a border strip of frames with so many."""
    return max(1, size // 64)


def _bars(grey: FloatArray) -> tuple[int, ...]:
    counts = []
    for side in SIDES:
        brightest = _from_side(grey, side).max(axis=(0, 2))
        most = len(brightest) // _WIDEST_BAR
        counts.append(int(np.argmax(np.append(brightest[:most] > _BLACK, True))))
    return tuple(counts)


def _from_side(grey: FloatArray, side: str) -> FloatArray:
    """(T, lines, pixels of a line), the outermost line first."""
    lines = grey if side in ("top", "bottom") else grey.swapaxes(1, 2)
    return lines[:, ::-1] if side in ("bottom", "right") else lines


def _first_frame(two: FrameArray, small: FloatArray) -> dict[str, float]:
    """The first frame against the second, and its brightness against all others."""
    first, second = (luma(frame).astype(np.float32)[None] for frame in two)
    means = small.mean(axis=(1, 2))
    return {
        "step": float(first.mean() - second.mean()),
        "brightness": float(means[0] - means[1:].mean()),
        "spread": _ratio(float(first.std()), float(second.std())),
        "fine": _fineness(first) - _fineness(second),
    }


def _timing(small: FloatArray) -> dict[str, float]:
    """When things move: the share of all change that is in each part of the time, and when it begins, in frames."""
    change = np.abs(np.diff(small, axis=0)).mean(axis=(1, 2)).astype(np.float64)
    total = change.sum()
    if total == 0:  # a picture: as if it moved evenly
        change, total = np.ones_like(change), float(len(change))
    parts = [float(part.sum() / total) for part in np.array_split(change, min(PARTS, len(change)))]
    begins = float(np.argmax(np.cumsum(change) >= _BEGUN * total))
    return {"begins": begins, "first step": float(change[0] / total * len(change)),
            **{f"part {number}": share for number, share in enumerate(parts, 1)}}  # fmt: skip


def _still(small: FloatArray) -> FloatArray:
    """A pixel's usual distance from its neighbourhood, over that and how much it varies."""
    above = np.stack([frame - blurred(frame, _NEIGHBOURHOOD) for frame in small])
    usual = np.median(above, axis=0)
    return np.asarray(usual / (np.abs(usual) + above.std(axis=0) + 1), np.float32)


def _ratio(first: float, second: float) -> float:
    """The logarithm of a ratio of brightnesses."""
    return math.log((first + LEVEL) / (second + LEVEL))
