"""The suite for any video: motion, flicker, sharpness, drift and jumps at chunk borders, from the pixels alone.

Nothing is downloaded: optical flow is OpenCV's. A measure is a number for each frame, pair or triple of frames; a
clip's value is their weighted mean, and so is its value in a part of its time. Lengths are in frame heights and times
in seconds, so clips of other sizes and rates compare; what is finer than the pixels of a clip is not seen in it.
docs/evaluation.md has the definitions as a table.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from afd_scale.config import RunConfig
from afd_scale.evaluation.suites.suite import Metric, Timing, parts_of
from afd_scale.mp4 import FrameArray
from afd_scale.types import Prompts
from afd_scale.vision import FloatArray, along, lab, luma, make_flow, with_flow_rows

LEAST_FRAMES = 3  # flicker and acceleration are of three
TIME_BINS = 4

# VBench (arXiv:2311.17982) calls a clip dynamic where a quarter of its pairs of frames, at 8 a second, move by 6 of 256
# pixels in the 5 % that move most.
FASTEST_SHARE = 0.05
DYNAMIC_SPEED = 6 / 256 * 8  # heights a second
DYNAMIC_SHARE = 0.25

STILL = 5e-4  # heights a frame, an eighth of a pixel of 256: below, flow is mostly error
STILL_FRAME = STILL / 5  # the same of the mean over a frame, most of which may stand still
HALF_LEVEL = 0.5 / 255  # of brightness: below, differences are mostly rounding
FLAT = 2 / 255  # contrast of a frame below which it shows nothing

METRICS: Mapping[str, Metric] = {
    "motion": Metric("Motion", "teacher", "speed of the fastest 5 % of pixels, heights a second"),
    "dynamic_degree": Metric("Dynamic degree", "teacher", "share of clips that move as VBench asks for"),
    "jerkiness": Metric("Jerkiness", "teacher", "change of motion over motion: 0 smooth, 2 to and fro"),
    "flicker": Metric("Flicker", "lower", "brightness off both neighbours along the motion, % of full range"),
    "sharpness": Metric("Sharpness", "teacher", "slope of edges over contrast, per height; far above is noise"),
    "brightness": Metric("Brightness", "teacher", "mean lightness, CIE L*, 0 to 100"),
    "saturation": Metric("Saturation", "teacher", "mean chroma, CIE a*b*"),
    "brightness_drift": Metric("Brightness drift", "teacher", "lightness against the clip's opening, CIE L*"),
    "colour_drift": Metric("Colour drift", "teacher", "mean colour against the clip's opening, CIE a*b*"),
    "border_jump": Metric("Jump at chunk borders", "lower", "what motion leaves unexplained there over elsewhere"),
    "border_jerk": Metric("Jerk at chunk borders", "lower", "change of motion there over elsewhere"),
}


class VideoSuite:
    """The suite for any data: the teacher's clips are the data's."""

    metrics: ClassVar[Mapping[str, Metric]] = METRICS
    over_time: ClassVar[Mapping[str, Metric]] = METRICS
    renders_teacher: ClassVar[bool] = False

    def __init__(self, config: RunConfig) -> None:
        pass

    def check(self, prompts: Prompts) -> None:
        """It reads none."""

    def teacher(self, prompts: Prompts, clips: int, lengths: int = 1) -> FrameArray:
        raise AssertionError("they are the data's")

    def measure(self, clips: Mapping[str, FrameArray], prompts: Prompts, timing: Timing) -> dict[str, dict[str, float]]:
        return measure_clips(clips, timing.fps, timing.borders)

    def measure_part(
        self, clips: Mapping[str, FrameArray], prompts: Prompts, timing: Timing, part: slice
    ) -> dict[str, dict[str, float]]:
        return {
            name: mean_values([measure_clip_part(clip, timing.fps, timing.borders, part) for clip in own])
            for name, own in clips.items()
        }

    def measure_each(self, clips: FrameArray, prompts: Prompts, timing: Timing) -> dict[str, NDArray[np.float64]]:
        measured = [measure_clip(clip, timing.fps, timing.borders).values for clip in clips]
        names = [name for name in METRICS if any(name in values for values in measured)]
        return {name: np.array([values.get(name, math.nan) for values in measured]) for name in names}


@dataclass(frozen=True)
class ClipMeasures:
    """What was measured of one clip.

    Attributes:
        values: by metric; what cannot be measured of the clip is not in it.
        by_time: by metric, as many values as there are bins of time; NaN where nothing falls into one. Metrics that are
            of a whole clip are not in it.
        by_length: of a longer clip, `values` of each part as long as this one; else empty.
    """

    values: dict[str, float]
    by_time: dict[str, list[float]]
    by_length: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Series:
    """A measure over a clip.

    Attributes:
        values: one a frame, pair or triple.
        times: of each, in frames from the start.
        weights: of each in a mean.
    """

    values: NDArray[np.float64]
    times: NDArray[np.float64]
    weights: NDArray[np.float64]

    @classmethod
    def of(cls, values: ArrayLike, begin: float, weights: ArrayLike | None = None) -> "Series":
        """Values one frame apart."""
        own = np.asarray(values, np.float64)
        return cls(own, begin + np.arange(len(own)), np.ones(len(own)) if weights is None else np.asarray(weights))

    def mean(self, chosen: NDArray[np.bool_] | None = None) -> float:
        """NaN of none."""
        values, weights = (self.values, self.weights) if chosen is None else (self.values[chosen], self.weights[chosen])
        return float(np.average(values, weights=weights)) if len(values) else math.nan

    def by_time(self, bins: int, frames: int) -> list[float]:
        numbers = np.floor(self.times * bins / frames).astype(int)
        return [self.mean(numbers == number) for number in range(bins)]


def chunk_borders(frames: int, chunk_frames: int, first_chunk_frames: int | None = None) -> tuple[int, ...]:
    """The first frame of every chunk but the first.

    Args:
        frames: of the clip.
        chunk_frames: pixel frames of a chunk; of Wan 4 times its latent frames.
        first_chunk_frames: of the first, where it has others: Wan's first latent frame is one frame, not 4.
    """
    return tuple(range(first_chunk_frames or chunk_frames, frames, chunk_frames))


def measure_clips(
    clips: Mapping[str, FrameArray], fps: float, borders: Sequence[int] | None = None
) -> dict[str, dict[str, float]]:
    """Means of all metrics over the clips of each policy.

    Args:
        clips: name to N clips, uint8 (N, T, H, W) or (N, T, H, W, 3), T >= 3.
        fps: frames a second.
        borders: see `measure_clip`.
    """
    return {name: mean_values([measure_clip(clip, fps, borders) for clip in own]) for name, own in clips.items()}


def mean_values(measured: Sequence[ClipMeasures]) -> dict[str, float]:
    """Means by metric over the clips that have it, in the order of METRICS."""
    columns = {name: [clip.values[name] for clip in measured if name in clip.values] for name in METRICS}
    return {name: float(np.mean(column)) for name, column in columns.items() if column}


def measure_long_clip(
    clip: FrameArray, fps: float, borders: Sequence[int] | None, frames: int, lengths: int
) -> ClipMeasures:
    """Measure the start of a clip, and every part of it that is as long.

    Args:
        clip: see `measure_clip`; of `lengths` times so many frames.
    """
    measured = [measure_clip_part(clip, fps, borders, part) for part in parts_of(frames, lengths)]
    return replace(measured[0], by_length=[each.values for each in measured] if lengths > 1 else [])


def measure_clip_part(clip: FrameArray, fps: float, borders: Sequence[int] | None, part: slice) -> ClipMeasures:
    """Measure so many frames of a longer clip; drift is from how the whole clip opens.

    Args:
        clip, borders: of all of it, see `measure_clip`.
    """
    within = None if borders is None else [at - part.start for at in borders if part.start < at < part.stop]
    return measure_clip(clip[part], fps, within, opening=clip[: _opening_frames(part.stop - part.start)])


def measure_clip(
    clip: FrameArray, fps: float, borders: Sequence[int] | None = None, bins: int = TIME_BINS,
    opening: FrameArray | None = None,
) -> ClipMeasures:  # fmt: skip
    """Measure one clip.

    Args:
        clip: uint8 (T, H, W), (T, H, W, 1) or (T, H, W, 3), T >= 3.
        fps: frames a second.
        borders: the first frame of every chunk but the first; None where chunks are not known, and where all frames or
            none are at a border: the jumps there are then not measured.
        bins: of time.
        opening: frames that drift is from; None are the clip's first eighth.
    Raises:
        ValueError: another shape or type.
    """
    colours = clip.shape[3:] in ((), (1,), (3,))
    if clip.dtype != np.uint8 or clip.ndim not in (3, 4) or not colours or len(clip) < LEAST_FRAMES or not clip.size:
        raise ValueError(f"clip ({clip.dtype} {clip.shape}) must be uint8 (T, H, W), or with 1 or 3 colours, of "
                         f"{LEAST_FRAMES} frames or more: flicker and acceleration are of three")  # fmt: skip
    small = with_flow_rows(clip)
    moving = _motion(np.stack([luma(frame) for frame in small]), fps)
    series = {name: moving[name] for name in ("motion", "jerkiness", "flicker")}
    series["sharpness"] = Series.of([_sharpness(luma(frame)) for frame in clip], 0)
    series |= _colours(small, small[: _opening_frames(len(clip))] if opening is None else with_flow_rows(opening))
    values = {name: measure.mean() for name, measure in series.items()}
    values["dynamic_degree"] = float((moving["motion"].values >= DYNAMIC_SPEED).mean() >= DYNAMIC_SHARE)
    for name, at, floor in (("border_jump", "residual", HALF_LEVEL), ("border_jerk", "turn", STILL)):
        ratio = _border_ratio(moving[at], borders or (), floor)
        if ratio is not None:
            values[name] = ratio
    by_time = {name: measure.by_time(bins, len(clip)) for name, measure in series.items()}
    return ClipMeasures({name: values[name] for name in METRICS if name in values}, by_time)


def _motion(frames: FrameArray, fps: float) -> dict[str, Series]:
    """What follows from flow.

    motion: of a pair of frames, mean speed of the fastest pixels.
    jerkiness: of a triple, mean length of the change of motion along the motion, over mean motion. Pixels that move
        count by how far; triples too.
    flicker: of a frame, how far it is outside of its two neighbours' values, moved along the motion. What comes into
        sight or fades is between them, or like one of them.
    residual: of a pair, brightness that changes along the motion.
    turn: of a triple, mean change of motion along the motion, heights a frame.
    """
    height = frames.shape[1]
    speed, turn, shift, flicker, residual = [], [], [], [], []
    before: FloatArray | None = None
    for number, forward, backward in _flows(frames):
        lengths = np.hypot(forward[..., 0], forward[..., 1]) / height
        fastest = max(1, round(FASTEST_SHARE * lengths.size))
        speed.append(float(np.partition(lengths, -fastest, axis=None)[-fastest:].mean()) * fps)
        followed = along(forward, frames[number + 1])
        residual.append(float(np.abs(followed - frames[number]).mean()) / 255)
        if before is not None:
            last_lengths = np.hypot(before[..., 0], before[..., 1]) / height
            change = along(before, forward) - before
            turn.append(float(np.hypot(change[..., 0], change[..., 1]).mean()) / height)
            shift.append(float((lengths.mean() + last_lengths.mean()) / 2))
        if backward is not None:
            neighbours = (along(backward, frames[number - 1]), followed)
            outside = np.maximum(frames[number] - np.maximum(*neighbours), np.minimum(*neighbours) - frames[number])
            flicker.append(100 * float(np.maximum(outside, 0).mean()) / 255)
        before = forward
    weights = np.asarray(shift) + STILL_FRAME
    return {
        "motion": Series.of(speed, 0.5),
        "jerkiness": Series.of(np.asarray(turn) / weights, 1, weights),
        "flicker": Series.of(flicker, 1),
        "residual": Series.of(residual, 0.5),
        "turn": Series.of(turn, 1),
    }


def _flows(frames: FrameArray) -> Iterator[tuple[int, FloatArray, FloatArray | None]]:
    """Of every frame but the last: its number, flow to the next frame, and to the one before."""
    flow = make_flow()
    for number in range(len(frames) - 1):
        backward = flow(frames[number], frames[number - 1]) if number else None
        yield number, flow(frames[number], frames[number + 1]), backward


def _sharpness(frame: FrameArray) -> float:
    """Root mean square of a frame's slopes over its contrast, per frame height."""
    level = frame.astype(np.float32) / 255
    slopes = [(np.diff(level, axis=axis) ** 2).mean() for axis in (0, 1) if level.shape[axis] > 1]
    return float(math.sqrt(sum(slopes)) * len(level) / max(float(level.std()), FLAT))


def _opening_frames(frames: int) -> int:
    return max(1, frames // 8)


def _colours(frames: FrameArray, opening: FrameArray) -> dict[str, Series]:
    """Lightness and chroma of the frames, and how far mean lightness and colour are from those of the opening."""
    converted, begun = ([lab(frame).reshape(-1, 3) for frame in some] for some in (frames, opening))
    means, at_first = (np.stack([pixels.mean(axis=0) for pixels in some]).astype(np.float64)
                       for some in (converted, begun))  # fmt: skip
    away = means - at_first.mean(axis=0)
    return {
        "brightness": Series.of(means[:, 0], 0),
        "saturation": Series.of([float(np.hypot(pixels[:, 1], pixels[:, 2]).mean()) for pixels in converted], 0),
        "brightness_drift": Series.of(np.abs(away[:, 0]), 0),
        "colour_drift": Series.of(np.hypot(away[:, 1], away[:, 2]), 0),
    }


def _border_ratio(measure: Series, borders: Sequence[int], floor: float) -> float | None:
    """Mean at the borders over the mean elsewhere; None where one of the two is empty.

    A pair is at a border where its frames are of two chunks, and so is a triple.
    """
    reach = 0.5 if measure.times[0] % 1 else 1.0  # of a pair and a triple around its time, in frames
    edges = np.asarray(borders, np.float64) - 0.5
    at = (np.abs(measure.times[:, None] - edges) < reach).any(axis=1)
    if at.all() or not at.any():
        return None
    return (measure.mean(at) + floor) / (measure.mean(~at) + floor)
