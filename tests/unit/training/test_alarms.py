"""Alarms are told once when they begin and once when they are over, also by a run that was stopped in between."""

import json
import logging

from afd_scale.training.metrics import recording


def _fooled(step, probability):
    return {"discriminator/win_probability": probability, "discriminator/accuracy": 0.5}


def _run(folder, values, first=1):
    """Log a value every fifth step; alarms that are on after each."""
    standing = []
    with recording("run", folder, range(first, 1001), [], {}, is_main=True) as record:
        standing.append(sorted(record.standing))
        for number, value in enumerate(values):
            step = first + 4 + 5 * number
            record(step, _fooled(step, value))
            standing.append(sorted(record.standing))
    return standing


def test_begin_and_end_are_said_once_each(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    standing = _run(tmp_path, [0.9] * 8 + [0.2] * 8)
    assert [bool(names) for names in standing].index(True) == 5, "when the window is full"
    told = [(record.levelname, record.getMessage()) for record in caplog.records if "alarm" in record.getMessage()]
    assert [level for level, _ in told] == ["WARNING", "INFO"]
    assert told[0][1].startswith("run, step 25: alarm saturated: the judge takes rollouts for better")
    assert "raise the judge's learning rate" in told[0][1]
    assert told[1][1] == "run, step 50: alarm saturated is over"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("alarm/saturated") for line in lines] == [None] * 4 + [1.0] * 5 + [0.0] * 7


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path, caplog):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    values = [0.9] * 8 + [0.7] * 4
    _run(whole, values)
    _run(parts, values[:8])
    caplog.clear()
    standing = _run(parts, values[6:], first=31)
    assert standing[0] == ["saturated"], "it stood when the run was stopped"
    assert "alarm saturated: " not in caplog.text, "and is not raised again"
    assert (parts / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def test_trackers_have_alarms_too(tmp_path):
    class Told:
        values = []

        def metrics(self, step, values):
            self.values.append(values.get("alarm/saturated"))

    with recording("run", tmp_path, range(1, 100), [Told()], {}, is_main=True) as record:
        for step in range(1, 7):
            record(step, _fooled(step, 0.9))
    assert Told.values == [None] * 4 + [1.0] * 2
