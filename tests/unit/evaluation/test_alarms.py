"""Alarms on histories that were made up: each is raised, is not, and is over."""

from typing import get_args

import pytest

from afd_scale.config.run import Alarm
from afd_scale.evaluation.alarms import LOOKS, PREFIX, REMEDIES, RULES, WINDOW, check, episodes
from afd_scale.evaluation.suites.suite import Metric

METRICS = {
    "moving": Metric("Moving", "higher", ""),
    "flicker": Metric("Flicker", "lower", ""),
    "sharpness": Metric("Sharpness", "teacher", ""),
    "motion": Metric("Motion", "teacher", ""),
}
TEACHER = {"moving": 1.0, "flicker": 0.1, "sharpness": 1.0, "motion": 2.0}
GOOD = {"moving": 0.6, "flicker": 0.2, "sharpness": 0.8, "motion": 1.6}


def training(values, key="discriminator/win_probability", **others):
    """A record a value, as of every fifth step."""
    return [{"step": 5 * (row + 1), key: value, **others} for row, value in enumerate(values)]


def look(step, gap=1.0, spread=0.2, diversity=0.5, **metrics):
    return {
        "step": step,
        "diagnostics/logit_gap": gap,
        "diagnostics/logit_group_std": spread,
        "diagnostics/diversity": diversity,
        **{f"diagnostics/{name}": value for name, value in (GOOD | metrics).items()},
        **{f"diagnostics/teacher/{name}": value for name, value in TEACHER.items()},
    }


def history(records):
    """As a run logs them: each record with the verdicts on it."""
    logged = []
    for record in records:
        logged.append(dict(record))
        logged[-1] |= {PREFIX + name: float(verdict.on) for name, verdict in check(logged, METRICS).items()}
    return logged


def on(records, name):
    """Steps at which an alarm is on."""
    return [record["step"] for record in history(records) if record.get(PREFIX + name)]


def test_every_alarm_has_a_remedy_and_can_stop_a_run():
    assert list(RULES) == list(REMEDIES) == list(get_args(Alarm))


def test_nothing_to_go_by_is_no_verdict():
    assert check([{"step": 5, "student/loss": 1.0}], METRICS) == {}
    assert check(training([0.9] * (WINDOW - 1)), METRICS) == {}
    assert check([look(0)], METRICS) == {}


def test_saturated_by_probability():
    records = training([0.4] * 5 + [0.95] * 8 + [0.3] * 8, **{"discriminator/accuracy": 0.5})
    steps = on(records, "saturated")
    assert steps[0] == 45, "the mean of five passes 0.75 with four at 0.95"
    assert steps == list(range(45, steps[-1] + 5, 5)), "without a break"
    assert steps[-1] == 75, "over with three of five at 0.3"
    assert not on(training([0.49] * 20, **{"discriminator/accuracy": 0.5}), "saturated")


def test_saturated_by_pairs_whatever_the_scale_of_logits():
    pairs = training([0.1] * 6, key="discriminator/accuracy", **{"discriminator/win_probability": 0.501})
    assert on(pairs, "saturated") == [25, 30]
    (found,) = [episode for episode in episodes(history(pairs), METRICS) if episode.name == "saturated"]
    assert "they win 90% of the pairs" in found.sentence


def test_the_warm_up_does_not_count():
    warm_up = [{**record, "step": record["step"] - 100} for record in training([0.99] * 9)]
    assert check(warm_up, METRICS) == {}


def test_suppressed():
    records = training([0.3, 0.1] + [0.001] * 6 + [0.3] * 3, **{"discriminator/accuracy": 1.0})
    assert on(records, "suppressed") == [30, 35, 40]
    assert not on(training([0.15] * 9, **{"discriminator/accuracy": 0.999}), "suppressed"), "as a healthy run ends"


def test_the_judge_is_named_where_there_are_several():
    records = [
        {"step": 5 * row, "discriminator/motion/win_probability": 0.001, "discriminator/motion/accuracy": 1.0,
         "discriminator/win_probability": 0.3, "discriminator/accuracy": 0.8}
        for row in range(1, 7)
    ]  # fmt: skip
    assert check(records, METRICS)["suppressed"].sentence.startswith("judge motion tells")
    assert check(records, METRICS)["saturated"].sentence.startswith("the judge takes")


def test_an_alarm_is_over_only_well_beyond_its_limit():
    accuracy = {"discriminator/accuracy": 0.5}
    assert on(training([0.76] * 5 + [0.7] * 6, **accuracy), "saturated")[-1] == 55, "0.7 is above 0.675"
    assert not on(training([0.7] * 11, **accuracy), "saturated"), "where it would raise none"


WORSE = {"moving": 0.3, "flicker": 0.4, "sharpness": 0.75}


def test_hacked():
    assert on([look(0), look(40, gap=1.5), look(80, gap=0.4, **WORSE)], "hacked") == [80]
    (found,) = episodes(history([look(0), look(40, gap=1.5), look(80, gap=0.4, **WORSE)]), METRICS)
    assert "since step 40 the logit gap on the diagnosed prompts went from 1.5 to 0.4" in found.sentence
    assert "2 of 4 metrics got worse (flicker 0.2 -> 0.4, moving 0.6 -> 0.3) and 0 better" in found.sentence
    assert (found.first, found.last, found.remedy) == (80, None, REMEDIES["hacked"])


@pytest.mark.parametrize(
    "after",
    [
        look(80, gap=0.4),
        look(80, gap=0.4, moving=0.9, flicker=0.1),
        look(80, gap=0.4, moving=0.3, flicker=0.1),
        look(80, gap=1.4, **WORSE),
        look(80, gap=2.5, **WORSE),
    ],
    ids=["metrics stay", "metrics rise", "one falls, one rises", "the gap stays", "the gap opens"],
)
def test_not_hacked(after):
    assert not on([look(0), look(40, gap=1.5), after], "hacked")


def test_a_gap_within_the_spread_of_logits_is_no_gap():
    assert not on([look(0, gap=0.1), look(40, gap=0.0, **WORSE)], "hacked")


def test_a_judge_that_prefers_the_student_ever_more_is_hacked_too():
    assert on([look(0, gap=-0.1), look(40, gap=-0.5, **WORSE)], "hacked") == [40]


def test_hacked_is_over_when_the_gap_is_back():
    records = [look(0), look(40, gap=0.1, **WORSE), look(80, gap=0.9, **WORSE)]
    assert on(records, "hacked") == [40]
    (found,) = episodes(history(records), METRICS)
    assert (found.first, found.last) == (40, 80)


def test_collapsed_by_training():
    key = "rollout/diversity"
    assert on(training([0.06] * 5 + [0.01] * 6, key), "collapsed")[0] == 50, "the window is full of small ones"
    assert not on(training([0.06] * 5 + [0.04] * 6, key), "collapsed")
    rewards = training([0.5] * 5 + [0.01] * 6, "rollout/reward_group_std")
    assert on(rewards, "collapsed") == [50, 55]
    assert "rewards of a prompt's rollouts differ 0.02 times" in check(rewards, METRICS)["collapsed"].sentence


def test_collapsed_by_looks():
    assert on([look(0), look(40, diversity=0.1), look(80, diversity=0.1)], "collapsed") == [80], "two in a row"
    assert not on([look(0), look(40, diversity=0.1), look(80, diversity=0.4)], "collapsed")


@pytest.mark.parametrize(("name", "metric", "low"), [("blurred", "sharpness", 0.5), ("static", "motion", 0.8)])
def test_below_the_teacher(name, metric, low):
    assert LOOKS == 2
    records = [look(0), look(40, **{metric: low}), look(80, **{metric: low}), look(120), look(160)]
    assert on(records, name) == [80]
    (found,) = episodes(history(records), METRICS)
    assert (found.name, found.first, found.last) == (name, 80, 120)
    assert f"on the diagnosed prompts {metric} is {low}" in found.sentence
    assert not on([look(0), look(40), look(80)], name)


def test_a_teacher_that_stands_still_asks_for_no_motion():
    still = [{**look(step, motion=0.0), "diagnostics/teacher/motion": 0.0} for step in (0, 40, 80)]
    assert "static" not in check(still, METRICS)


def test_values_that_were_not_finite_do_not_count():
    records = training([None, 0.4, 0.4, 0.4, 0.4, 0.4], **{"discriminator/accuracy": None})
    assert check(records, METRICS) == {}
