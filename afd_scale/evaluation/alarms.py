"""What in a run's metrics says that it goes wrong: rules over its logged records, each with a sentence and a remedy.

A rule sees the records up to a step, the newest last, and nothing else: what it needs of earlier times it finds there.
The regimes of a judge's learning rate are those of the paper (arXiv:2605.26105): one that lags is fooled (saturated),
one that runs ahead tells every rollout apart (suppressed), one that stands still is hacked.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from afd_scale.evaluation.suites.suite import Metric

Record = Mapping[str, Any]  # a line of metrics.jsonl
Records = Sequence[Record]
SuiteMetrics = Mapping[str, Metric]

PREFIX = "alarm/"
LOOK = "diagnostics/"

# Logged steps over which a metric of training is averaged, at the start and now: one batch says little.
WINDOW = 5
# Looks at the diagnosed prompts, in a row, of which each must find the same: one is of a few dozen clips.
LOOKS = 2
# An alarm that is on is over when its figure is this share of the limit beyond the limit, so that it does not flicker.
SLACK = 0.1

# Win probability of rollouts against the teacher's videos, or the share of pairs that they win, which the scale of
# logits does not change. 1/2 is a judge that cannot tell; above 3/4, three pairs to one or a mean margin of a logit, it
# is wrong and sure of it. One that learns beside the student stays below 1/2.
SATURATED = 0.75
# The judge would lose one pair in twenty. The toy world's healthy run falls to 0.12 in the end, one whose judge learns
# forty times as fast is below from the start.
SUPPRESSED = 0.05
# Part by which the logit gap closes before it counts, of the widest that a look has found.
HACKED_GAP = 0.5
# Change of a metric that is none yet, of its earlier value. Two looks have the same prompts and noise, but of 32 clips
# one more or less is a tenth of a share like the toy base's.
HACKED_CHANGE = 0.2
LEAST_SHARE = 0.1  # of the teacher's value, that an earlier value counts as at least
# Metrics that must be worse, beyond those that are better, of all that have a direction.
HACKED_SHARE = 0.25
# Spread of a prompt's rollouts, of their latents or their rewards, over that at the start. A student that learns one
# teacher's way loses some of it: the toy world's healthy run keeps 0.80 of the latents', one with ten times the
# student's learning rate 0.46. The rewards' spread grows with the judge.
COLLAPSED_DIVERSITY = 0.5
COLLAPSED_REWARD = 0.1
# Sharpness over the teacher's. The toy world's base and its healthy runs have 0.73 to 0.77 of it.
BLURRED = 0.6
# Motion over the teacher's. The paper's fine-tuned baseline, whose loss of motion is its point, has a dynamic degree of
# 44 where its base has 92; its AFD 79, and its DMD, still called moving, 53.
STATIC = 0.5
MOTION = ("motion", "dynamic_degree")  # the first that a suite has


@dataclass(frozen=True)
class Verdict:
    """Of a rule at a step."""

    on: bool
    sentence: str


@dataclass(frozen=True)
class Episode:
    """A time that an alarm was on.

    Attributes:
        first, last: logged steps; None where it is on to the end.
        sentence: what was found when it began.
    """

    name: str
    first: int
    last: int | None
    sentence: str
    remedy: str


def check(records: Records, metrics: SuiteMetrics) -> dict[str, Verdict]:
    """The verdict on the newest record of each rule that has something to go by."""
    found: dict[str, Verdict] = {}
    for name, rule in RULES.items():
        verdict = rule(records, metrics, SLACK if _was_on(name, records) else 0.0)
        if verdict is not None:
            found[name] = verdict
    return found


def episodes(records: Records, metrics: SuiteMetrics) -> list[Episode]:
    """Of all alarms that a run's records say were on, in the order of their beginnings."""
    found = []
    for name, rule in RULES.items():
        on = [bool(record.get(PREFIX + name)) for record in records]
        for row in range(len(records)):
            if not on[row] or (row and on[row - 1]):
                continue
            last = next((records[after]["step"] for after in range(row, len(records)) if not on[after]), None)
            verdict = rule(records[: row + 1], metrics, 0.0)
            sentence = verdict.sentence if verdict else ""
            found.append(Episode(name, records[row]["step"], last, sentence, REMEDIES[name]))
    return sorted(found, key=lambda episode: episode.first)


def _was_on(name: str, records: Records) -> bool:
    return len(records) > 1 and bool(records[-2].get(PREFIX + name))


def _saturated(records: Records, metrics: SuiteMetrics, slack: float) -> Verdict | None:
    found = [(max(probability, share), judge, probability, share) for judge, probability, share in _wins(records)]
    if not found:
        return None
    value, judge, probability, share = max(found)
    sentence = (f"{judge} takes rollouts for better than the teacher's videos: they win {share:.0%} of the pairs, with "
                f"a mean probability of {probability:.2f}; one that cannot tell has 50% and 0.5")  # fmt: skip
    return Verdict(value > SATURATED * (1 - slack), sentence)


def _suppressed(records: Records, metrics: SuiteMetrics, slack: float) -> Verdict | None:
    found = [(probability, judge, share) for judge, probability, share in _wins(records)]
    if not found:
        return None
    value, judge, share = min(found)
    sentence = (f"{judge} tells rollouts from the teacher's videos with ease: they win {share:.1%} of the pairs, with "
                f"a mean probability of {value:.3f}")  # fmt: skip
    return Verdict(value < SUPPRESSED * (1 + slack), sentence)


def _hacked(records: Records, metrics: SuiteMetrics, slack: float) -> Verdict | None:
    looks = _looks(records)
    moved = [name for name, metric in metrics.items() if metric.better and all(LOOK + name in look for look in looks)]
    if len(looks) < 2 or not moved:
        return None
    verdict = None
    for judge, key in _judges(looks[-1], LOOK, "logit_gap"):
        verdict = _hacks(judge, key, looks, metrics, moved, slack)
        if verdict.on:
            return verdict
    return verdict


def _hacks(
    judge: str, key: str, looks: Records, metrics: SuiteMetrics, names: Sequence[str], slack: float
) -> Verdict:  # fmt: skip
    """Of one judge: its gap now against the widest before, and the metrics between these two looks."""
    now = looks[-1]
    widest = max((look for look in looks if key in look), key=lambda look: float(look[key]))
    before, after = float(widest[key]), float(now[key])
    spread = float(widest.get(key.removesuffix("gap") + "group_std", 0.0))
    closed = before - after >= max(HACKED_GAP * (1 - slack) * abs(before), spread)
    changes = {name: _worsening(name, metrics[name], widest, now) for name in names}
    worse = [name for name, change in changes.items() if change > HACKED_CHANGE]
    better = [name for name, change in changes.items() if change < -HACKED_CHANGE]
    fell = len(worse) - len(better) >= max(1, HACKED_SHARE * (1 - slack) * len(names))
    shown = sorted(worse, key=lambda name: -changes[name])[:3]
    listed = ", ".join(f"{name} {widest[LOOK + name]:.3g} -> {now[LOOK + name]:.3g}" for name in shown) or "none yet"
    sentence = (f"the student wins {judge} over and not the metrics: since step {widest['step']} the logit gap on the "
                f"diagnosed prompts went from {before:.3g} to {after:.3g}, while {len(worse)} of {len(names)} metrics "
                f"got worse ({listed}) and {len(better)} better")  # fmt: skip
    return Verdict(closed and fell, sentence)


def _worsening(name: str, metric: Metric, before: Record, now: Record) -> float:
    """How much worse a metric is, of its earlier value; how much further from the teacher's, of that."""
    old, new = float(before[LOOK + name]), float(now[LOOK + name])
    teacher = float(now.get(f"{LOOK}teacher/{name}", 0.0))
    if metric.better == "teacher":
        return (abs(new - teacher) - abs(old - teacher)) / (abs(teacher) or 1.0)
    scale = max(abs(old), LEAST_SHARE * abs(teacher)) or 1.0
    return (new - old if metric.better == "lower" else old - new) / scale


def _collapsed(records: Records, metrics: SuiteMetrics, slack: float) -> Verdict | None:
    looked = [float(look[f"{LOOK}diversity"]) for look in _looks(records) if f"{LOOK}diversity" in look]
    ratios: list[tuple[str, float, float]] = []  # what, over the start, limit
    if len(looked) > LOOKS:
        ratios.append(("latents of a prompt's rollouts", _over(max(looked[-LOOKS:]), looked[0]), COLLAPSED_DIVERSITY))
    for key, what, limit in (
        ("rollout/diversity", "latents of a prompt's rollouts", COLLAPSED_DIVERSITY),
        ("rollout/reward_group_std", "rewards of a prompt's rollouts", COLLAPSED_REWARD),
    ):
        values = _trained(records, key)
        if len(values) >= 2 * WINDOW:
            ratios.append((what, _over(fmean(values[-WINDOW:]), fmean(values[:WINDOW])), limit))
    if not ratios:
        return None
    what, value, limit = min(ratios, key=lambda ratio: ratio[1] / ratio[2])
    return Verdict(value < limit * (1 + slack), f"the {what} differ {value:.2f} times as much as at the start")


def _blurred(records: Records, metrics: SuiteMetrics, slack: float) -> Verdict | None:
    return _below_teacher(records, ("sharpness",), BLURRED * (1 + slack))


def _static(records: Records, metrics: SuiteMetrics, slack: float) -> Verdict | None:
    return _below_teacher(records, MOTION, STATIC * (1 + slack))


def _below_teacher(records: Records, names: Sequence[str], limit: float) -> Verdict | None:
    """Whether the newest looks all find a metric below a share of the teacher's."""
    looks = _looks(records)[-LOOKS:]
    for name in names:
        if len(looks) == LOOKS and all(look.get(f"{LOOK}teacher/{name}") and LOOK + name in look for look in looks):
            shares = [float(look[LOOK + name]) / float(look[f"{LOOK}teacher/{name}"]) for look in looks]
            value, teacher = float(looks[-1][LOOK + name]), float(looks[-1][f"{LOOK}teacher/{name}"])
            sentence = (f"on the diagnosed prompts {name} is {value:.3g}, {shares[-1]:.2f} times the teacher's "
                        f"{teacher:.3g}")  # fmt: skip
            return Verdict(max(shares) < limit, sentence)
    return None


def _wins(records: Records) -> Iterator[tuple[str, float, float]]:
    """Of each judge that is trained by pairs, over the window once that is full: its name, mean win probability of
    rollouts against the teacher's videos, and the share of pairs that they win."""
    for judge, key in _judges(records[-1], "discriminator/", "win_probability"):
        probability = _trained(records, key)
        accuracy = _trained(records, key.removesuffix("win_probability") + "accuracy")
        if min(len(probability), len(accuracy)) >= WINDOW:
            yield judge, fmean(probability[-WINDOW:]), 1 - fmean(accuracy[-WINDOW:])


def _judges(record: Record, place: str, metric: str) -> list[tuple[str, str]]:
    """(judge in words, key) of a metric that each judge may have: `place/metric`, or `place/NAME/metric`."""
    keys = [key for key in record if key.startswith(place) and key.endswith(f"/{metric}") and record[key] is not None]
    names = [key.removeprefix(place).removesuffix(metric).rstrip("/") for key in keys]
    return [(f"judge {name}" if name else "the judge", key) for name, key in zip(names, keys, strict=True)]


def _trained(records: Records, key: str) -> list[float]:
    """Values of a metric behind the warm-up."""
    return [float(record[key]) for record in records if record["step"] > 0 and record.get(key) is not None]


def _looks(records: Records) -> list[Record]:
    return [record for record in records if any(key.startswith(LOOK) for key in record)]


def _over(now: float, start: float) -> float:
    return now / start if start else 1.0


RULES: Mapping[str, Callable[[Records, SuiteMetrics, float], Verdict | None]] = {
    "saturated": _saturated,
    "suppressed": _suppressed,
    "hacked": _hacked,
    "collapsed": _collapsed,
    "blurred": _blurred,
    "static": _static,
}
REMEDIES: Mapping[str, str] = {
    "saturated": "raise the judge's learning rate, or lower the student's: the judge must keep up",
    "suppressed": "lower the judge's learning rate, or give it r1_weight and r2_weight",
    "hacked": "let the judge learn (faster), or add a judge that sees something else; go back to an earlier checkpoint",
    "collapsed": "lower the student's learning rate, or raise prior_weight and old_policy_decay",
    "blurred": "lower the student's learning rate, and see in the samples from which step on it is so",
    "static": "see agreement/ in the diagnostics: a judge that likes still clips needs one beside it that sees motion",
}
