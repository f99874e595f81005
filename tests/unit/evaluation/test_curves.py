"""Small drawings of curves."""

import math
import re

from afd_scale.evaluation.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, curve_svg, ticks


def path(svg):
    return re.search(r'<path d="([^"]*)" fill="none"', svg)[1]


def test_ticks_are_round_numbers():
    assert ticks(0, 100, 5) == [0, 20, 40, 60, 80, 100]
    assert ticks(-19, 160, 5) == [0, 50, 100, 150]
    assert ticks(0.0, 0.0079, 5) == [0, 0.002, 0.004, 0.006]
    assert all(len(ticks(0, width, 4)) <= 5 for width in (1, 1.7, 3.3, 7.9, 9.99, 12, 1e-9, 1e12))


def test_a_line_spans_the_drawing():
    _, *drawn = re.split("[ML]", path(curve_svg([0, 5, 10], [1, 3, 2])))
    points = [[float(number) for number in point.split()] for point in drawn]
    assert [x for x, _ in points] == [LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT]
    heights = [y for _, y in points]
    assert min(heights) == heights[1] > TOP
    assert max(heights) == heights[0] < HEIGHT - BOTTOM


def test_a_line_is_broken_where_a_number_is_missing():
    assert path(curve_svg([0, 1, 2, 3], [1.0, 2.0, math.nan, 3.0])).count("M") == 2
    assert path(curve_svg([0, math.nan, 2], [1.0, 2.0, 3.0])).count("M") == 2
    assert "nan" not in curve_svg([0], [math.nan]).lower()


def test_constants_and_single_points_are_drawn():
    for svg in (curve_svg([5], [2.0]), curve_svg([1, 2], [0.0, 0.0]), curve_svg([3, 3], [1.0, 2.0])):
        assert svg.count("<circle") in (1, 2)


def test_a_reference_widens_the_range():
    svg = curve_svg([0, 1], [1.0, 2.0], reference=10.0)
    assert "stroke-dasharray" in svg
    assert ">10</text>" in svg
