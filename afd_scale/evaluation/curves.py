"""Small curves as SVG in a page's colours: a report has hundreds, which takes matplotlib a minute."""

import math
from collections.abc import Sequence

from markupsafe import Markup

WIDTH, HEIGHT = 340, 170  # of a drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 10, 24  # margins around the curve
FONT_SIZE = 11
STEPS = (1, 2, 2.5, 5, 10)  # between ticks, times a power of ten


def curve_svg(xs: Sequence[float], values: Sequence[float], reference: float | Sequence[float] | None = None) -> Markup:
    """One small curve; it is broken where a number is not finite.

    Args:
        reference: of a dashed line: its value across all, or one at each x.
    """
    points = [(x, y) for x, y in zip(xs, values, strict=True) if math.isfinite(x) and math.isfinite(y)]
    left, right = _range([x for x, _ in points], 0.0)
    if reference is None or isinstance(reference, int | float):
        dashed = [] if reference is None else [(left, reference), (right, reference)]
    else:
        dashed = [(x, y) for x, y in zip(xs, reference, strict=True) if left <= x <= right and math.isfinite(y)]
    low, high = _range([y for _, y in points + dashed], 0.1)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - left) / (right - left), (y - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in ticks(low, high, 4):
        _, y = place(left, tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="var(--rule)" stroke-width="1"/>')
        parts.append(_text(LEFT - 6, y + FONT_SIZE / 3, "end", _label(tick)))
    for tick in ticks(left, right, 5):
        x, _ = place(tick, low)
        parts.append(_text(x, HEIGHT - 6, "middle", _label(tick)))
    if dashed:
        corners = "L".join("{:.1f} {:.1f}".format(*place(x, y)) for x, y in dashed)
        parts.append(f'<path d="M{corners}" fill="none" stroke="currentColor" stroke-dasharray="4 4"/>')
    path, pen = "", "M"
    for x, value in zip(xs, values, strict=True):
        if math.isfinite(x) and math.isfinite(value):
            across, down = place(x, value)
            path, pen = f"{path}{pen}{across:.1f} {down:.1f}", "L"
        else:
            pen = "M"
    parts.append(f'<path d="{path}" fill="none" stroke="var(--accent)" stroke-width="2" stroke-linejoin="round"/>')
    if len(points) < 8:  # a line of few points shows where they are, and of one there is no line
        dots = [place(x, y) for x, y in points]
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="var(--accent)"/>' for x, y in dots]
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>')


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers within a range, at most so many intervals of them."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * factor for factor in (*STEPS, 20) if (high - low) / (power * factor) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    """That drawn values span, never empty."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        half = 0.5 * abs(low) or 0.5
        return low - half, high + half
    return low - margin * (high - low), high + margin * (high - low)


def _label(tick: float) -> str:
    return f"{tick:.6g}" if 1e-4 <= abs(tick) < 1e6 or abs(tick) < 1e-12 else f"{tick:.2g}"


def _text(x: float, y: float, anchor: str, words: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{FONT_SIZE}" text-anchor="{anchor}"'
    return f'<text {place} fill="currentColor">{words}</text>'
