"""Spans of long videos, and how they are shown."""

import math

import pytest

from afd_scale.evaluation.lengths import by_span, length_curves, length_rows, spans
from afd_scale.evaluation.suites.toy import ToySuite

NAN = math.nan
MEASURED = {
    "student": {"0-1x": {"mass_error": 0.01, "own": 2.0}, "1-2x": {"mass_error": 0.5}, "2-3x": {"mass_error": 0.25}},
    "teacher": {"0-1x": {"mass_error": 0.01}, "1-2x": {"mass_error": 0.02}, "2-3x": {"mass_error": None}},
}


def test_spans_double_up_to_the_end():
    assert spans(0) == []
    assert spans(1) == [range(1)]
    assert spans(8) == [range(0, 1), range(1, 2), range(2, 4), range(4, 8)]
    assert spans(6)[-1] == range(4, 6)


def test_a_span_is_the_mean_of_its_parts_that_have_a_value():
    parts = [{"a": 1.0, "b": NAN}, {"a": 2.0}, {"a": 3.0, "b": 5.0}, {"a": NAN, "b": 7.0}, {"a": 8.0}]
    assert by_span(parts) == {
        "0-1x": {"a": 1.0}, "1-2x": {"a": 2.0}, "2-4x": {"a": 3.0, "b": 6.0}, "4-5x": {"a": 8.0},
    }  # fmt: skip


def test_a_table_has_a_column_a_span_and_a_line_a_policy():
    assert length_rows(MEASURED, ToySuite.over_time) == [
        ["", "", "0-1x", "1-2x", "2-3x"],
        ["Mass error", "student", "0.010", "0.500", "0.250"],
        ["", "teacher", "0.010", "0.020", "-"],
        ["own", "student", "2.00", "-", "-"],
    ]


def test_curves_are_the_students_with_the_teachers_dashed():
    (label, meaning, svg), (other, _, lone) = length_curves(MEASURED, ToySuite.over_time)
    assert (label, other) == ("Mass error", "own")
    assert meaning == ToySuite.over_time["mass_error"].meaning
    assert svg.count("<circle") == 3
    assert dashed(svg).count("L") == 1, "from one point to the other"
    assert "dasharray" not in lone
    shorter = MEASURED | {"teacher": {"0-1x": {"mass_error": 0.3}}}
    across = dashed(length_curves(shorter, ToySuite.over_time)[0][2])
    begin, end = (point.split() for point in across.removeprefix("M").split("L"))
    assert begin[1] == end[1], "what the teacher has is a line across"
    assert float(end[0]) - float(begin[0]) == pytest.approx(340 - 48 - 14)


def dashed(svg):
    """The path of the dashed line."""
    return svg.split(' fill="none" stroke="currentColor"')[0].rpartition('d="')[2].removesuffix('"')
