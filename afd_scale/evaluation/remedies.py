"""What to do about a trait that tells two sides apart: a sentence with the numbers that were measured."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from afd_scale.evaluation.traits import CHANNELS, LEVEL, SIDES, Traits, strip_width

Side = Sequence[Traits]
Remedy = Callable[[Side, Side], str]

_OFTEN = 0.25  # mean of `Traits.still` over all clips from which on a pixel stands out in many
_OWN = "unless it is the student's own failing, which a judge should see"


def _means(side: Side, probe: str) -> dict[str, float]:
    return {name: float(np.mean([clip.values[probe][name] for clip in side])) for name in side[0].values[probe]}


def _gaps(teacher: Side, other: Side, probe: str) -> dict[str, float]:
    """Mean of the teacher's less the other's."""
    theirs = _means(other, probe)
    return {name: value - theirs[name] for name, value in _means(teacher, probe).items() if name in theirs}


def _telling(teacher: Side, other: Side, probe: str) -> str:
    """The trait whose gap is the most standard deviations within a side."""
    gaps = _gaps(teacher, other, probe)
    within = {name: math.hypot(*(np.std([clip.values[probe][name] for clip in side]) for side in (teacher, other)))
              for name in gaps}  # fmt: skip
    return max(gaps, key=lambda name: abs(gaps[name]) / (within[name] + 1e-6))


def _colour(teacher: Side, other: Side) -> str:
    gaps = _gaps(teacher, other, "colour")
    channels = [name for name in (*CHANNELS, "grey") if name in gaps]
    levels = ", ".join(f"{name} {gaps[name]:+.1f}" for name in channels)
    spreads = ", ".join(f"{gaps[f'{name} spread']:+.1f}" for name in channels)
    most = max(abs(gap) for gap in gaps.values())
    return (f"the teacher's mean colour is off by {levels} of 255, its contrast by {spreads}: shift brightness and "
            f"contrast of both sides at random by up to {math.ceil(2 * most)} levels, or match them, "
            f"{_OWN}")  # fmt: skip


def _sharpness(teacher: Side, other: Side) -> str:
    gaps = _gaps(teacher, other, "sharpness")
    name = _telling(teacher, other, "sharpness")
    percent = 100 * (math.exp(abs(gaps[name])) - 1)
    sharper, softer = ("teacher", "other side") if gaps[name] > 0 else ("other side", "teacher")
    how = "finer" if name == "fine" else "steeper"
    return (f"the {sharper}'s edges are {percent:.0f} % {how} than the {softer}'s: "
            f"bring both through the same sizes and codec, or blur both at random, {_OWN}")  # fmt: skip


def _noise(teacher: Side, other: Side) -> str:
    name = _telling(teacher, other, "noise")
    levels = [max(0.0, math.exp(_means(side, "noise")[name]) - LEVEL) for side in (teacher, other)]
    where = "from frame to frame in quiet places" if name == "in time" else "between neighbouring pixels in flat places"
    less = "teacher" if levels[0] < levels[1] else "other side"
    more = f"{abs(levels[0] - levels[1]):.1f} levels"
    return (f"{where} {levels[0]:.2f} levels of 255 are left at the teacher, {levels[1]:.2f} at the other side: add "
            f"noise of about {more} to the {less}, or denoise both, {_OWN}")  # fmt: skip


def _compression(teacher: Side, other: Side) -> str:
    name = _telling(teacher, other, "compression")
    ours, theirs = (_means(side, "compression")[name] for side in (teacher, other))
    said = {
        "blocks": f"steps at every 8th pixel are {math.exp(ours):.2f} times the others at the teacher, "
                  f"{math.exp(theirs):.2f} times at the other side",
        "repeated": f"{100 * ours:.0f} % of the quiet pixels repeat the frame before at the teacher, "
                    f"{100 * theirs:.0f} % at the other side",
        "coarse colours": f"colours are {math.exp(ours):.2f} times as coarse as brightness at the teacher, "
                          f"{math.exp(theirs):.2f} times at the other side",
    }[name]  # fmt: skip
    if name == "repeated":
        return f"{said}: bring both through the same codec and quality, or add faint noise to both, {_OWN}"
    return f"{said}: compress both with the same codec and quality, or decode both from latents"


def _borders(teacher: Side, other: Side) -> str:
    crops = {}
    for place, border in enumerate(SIDES):
        # Of nearly every clip: a bar is in all of them, a dark corner of a picture is not.
        bars = [int(np.quantile([clip.bars[place] for clip in own], 0.1)) for own in (teacher, other)]
        if bars[0] != bars[1]:
            crops[border] = max(bars)
    if crops:
        cuts = ", ".join(f"{_pixels(most)} at the {border}" for border, most in crops.items())
        return f"black bars differ: crop {cuts} of both sides"
    name = _telling(teacher, other, "borders")
    ours, theirs = (_means(side, "borders")[name] for side in (teacher, other))
    side, what = name.split()
    width = strip_width(teacher[0].shape[1 if side in ("top", "bottom") else 2])
    said = {
        "step": f"the outermost line is {ours:+.1f} levels of 255 off the one {width} farther in at the teacher, "
                f"{theirs:+.1f} at the other side",
        "level": f"a strip of {width} is {ours:+.1f} levels of 255 off the frame at the teacher, {theirs:+.1f} at the "
                 "other side",
        "spread": f"a strip of {width} has a contrast of {math.exp(ours) - 1:.1f} levels at the teacher, "
                  f"{math.exp(theirs) - 1:.1f} at the other side",
    }[what]  # fmt: skip
    return f"at the {side} {said}: crop {_pixels(width)} at the {side} of both sides, {_OWN}"


def _first_frame(teacher: Side, other: Side) -> str:
    name = _telling(teacher, other, "first frame")
    ours, theirs = (_means(side, "first frame")[name] for side in (teacher, other))
    said = {
        "step": f"the first frame is {ours:+.1f} levels of 255 off the second at the teacher, {theirs:+.1f}",
        "brightness": f"the first frame is {ours:+.1f} levels of 255 off the later ones at the teacher, {theirs:+.1f}",
        "spread": f"the first frame has {math.exp(ours):.2f} times the second's contrast at the teacher, "
                  f"{math.exp(theirs):.2f} times",
        "fine": f"the first frame is {math.exp(ours):.2f} times as fine as the second at the teacher, "
                f"{math.exp(theirs):.2f} times",
    }[name]  # fmt: skip
    if name == "brightness":
        return (f"{said} at the other side, so brightness drifts: match it, or let brightness drift at random by up to "
                f"{math.ceil(2 * abs(ours - theirs))} levels on both sides, {_OWN}")  # fmt: skip
    return f"{said} at the other side: trim the first frame of both sides, {_OWN}"


def _timing(teacher: Side, other: Side) -> str:
    begins = _gaps(teacher, other, "timing")["begins"]
    parts = [name for name in teacher[0].values["timing"] if name.startswith("part")]
    shares = [
        " ".join(f"{100 * _means(side, 'timing').get(name, 0):.0f}" for name in parts) for side in (teacher, other)
    ]
    said = (f"the parts of the time have {shares[0]} % of all change at the teacher, {shares[1]} % at the other side; "
            "this may be real motion, which a judge should see")  # fmt: skip
    frames = math.floor(abs(begins) + 0.5)
    if not frames:
        return said
    later = "teacher's" if begins > 0 else "other side's"
    return (f"motion of the {later} clips begins {abs(begins):.1f} frames later; {said}; if it is how the clips were "
            f"cut, trim {frames} frames from the start of the {later} and from the end of the others")  # fmt: skip


REMEDIES: Mapping[str, Remedy] = {
    "colour": _colour,
    "sharpness": _sharpness,
    "noise": _noise,
    "compression": _compression,
    "borders": _borders,
    "first frame": _first_frame,
    "timing": _timing,
}


def _pixels(number: int) -> str:
    return f"{number} pixel{'s' if number > 1 else ''}"


def standing_out(clips: Side) -> NDArray[np.float64]:
    """(N, D) of the pixels that stand out in many clips, the same way in each, whichever side's: perhaps none."""
    still = np.stack([clip.still for clip in clips]).reshape(len(clips), -1).astype(np.float64)
    return still[:, np.abs(still.mean(axis=0)) >= _OFTEN]


def still_remedy(teacher: Side, other: Side) -> str:
    """Where the pattern is that one side has in most clips, in pixels of the clips."""
    means = [np.mean([clip.still for clip in side], axis=0) for side in (teacher, other)]
    apart = np.abs(means[0] - means[1]) * (np.abs(means[0] + means[1]) / 2 >= _OFTEN)
    if not apart.any():  # the sides are of other sizes, or it is in few clips
        apart = np.abs(means[0] - means[1])
    rows, columns = np.nonzero(_around_the_most(apart))
    _, height, width, _ = teacher[0].shape
    small_height, small_width = apart.shape
    top, bottom = _stretched(rows.min(), rows.max() + 1, height / small_height, height)
    left, right = _stretched(columns.min(), columns.max() + 1, width / small_width, width)
    owner, side = ("teacher's", teacher) if abs(means[0][rows, columns]).sum() > abs(means[1][rows, columns]).sum() \
        else ("other side's", other)  # fmt: skip
    of_owner = means[0] if side is teacher else means[1]
    signs = np.sign(of_owner[rows, columns])
    share = np.mean([(clip.still[rows, columns] * signs).mean() > _OFTEN for clip in side])
    where = f"{_place(top + bottom, height)} {_place(left + right, width, 'left', 'right')}"
    return (f"{100 * share:.0f} % of the {owner} clips have a pattern that stands still at rows {top}-{bottom - 1}, "
            f"columns {left}-{right - 1} ({where}): mask or crop that region of both sides")  # fmt: skip


def _around_the_most(apart: NDArray[np.floating]) -> NDArray[np.bool_]:
    """The pixels that are apart by half of the most, as far as they are near to the one that is."""
    strong = apart >= apart.max() / 2
    row, column = np.unravel_index(np.argmax(apart), apart.shape)
    reach = [max(3, size // 5) for size in apart.shape]
    near = np.zeros_like(strong)
    near[max(0, row - reach[0]) : row + reach[0] + 1, max(0, column - reach[1]) : column + reach[1] + 1] = True
    return np.asarray(strong & near)


def _stretched(begin: int, end: int, scale: float, size: int) -> tuple[int, int]:
    return max(0, math.floor(begin * scale)), min(size, math.ceil(end * scale))


def _place(twice_middle: float, size: int, low: str = "top", high: str = "bottom") -> str:
    part = twice_middle / 2 / size
    return low if part < 1 / 3 else high if part > 2 / 3 else "middle"
