"""Shortcuts: trivial traits that tell the teacher's clips from others, and which a judge may learn.

Each group of traits is probed alone, so that a finding has a name and a remedy. A probe is linear and sees a few
numbers: what it finds any judge finds, and what it does not find may be there all the same. docs/data.md says how to
read the findings.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from afd_scale.evaluation.clip_sets import spread
from afd_scale.evaluation.linear_probe import Probed, probe_traits
from afd_scale.evaluation.remedies import REMEDIES, standing_out, still_remedy
from afd_scale.evaluation.traits import LEAST_FRAMES, Traits, traits_of
from afd_scale.mp4 import FrameArray

Verdict = Literal["gives away", "slight", "no", "cannot tell", "differs"]

LEAST_CLIPS = 16  # of a side, for a verdict
GIVES_AWAY = 0.75  # accuracy from which on a judge has little reason to look at anything else
WATERMARK, FORM = "watermark", "form"
MOST_WARNED_OF = 64  # clips of a side at the start of a run


@dataclass(frozen=True)
class Finding:
    """What a group of traits tells.

    Attributes:
        name: of the group.
        verdict: `gives away` and `slight` are beyond chance; `cannot tell` where the clips are too few; `differs` of
            the form, which is compared and not probed.
        accuracy: mean of the two sides' shares of unseen clips that were told right; None where nothing was probed.
        standard_error: of it.
        chance: accuracy that one random labelling in a thousand passes.
        remedy: what differs and what to do about it; empty where the verdict is `no`.
    """

    name: str
    verdict: Verdict
    accuracy: float | None = None
    standard_error: float | None = None
    chance: float | None = None
    remedy: str = ""


def probe(
    teacher: Sequence[FrameArray],
    other: Sequence[FrameArray],
    teacher_prompts: Sequence[str] | None = None,
    other_prompts: Sequence[str] | None = None,
) -> list[Finding]:
    """Look for shortcuts between two sides' clips.

    Args:
        teacher, other: clips, uint8 (T, H, W) or (T, H, W, 3), of one form on each side.
        teacher_prompts, other_prompts: of each clip; None where they are not known, each clip then has its own.
    Raises:
        ValueError: a clip is of another shape or type, or a side has none.
    """
    sides = ([traits_of(clip) for clip in teacher], [traits_of(clip) for clip in other])
    return probe_measured(*sides, teacher_prompts, other_prompts)


def probe_measured(
    teacher: Sequence[Traits],
    other: Sequence[Traits],
    teacher_prompts: Sequence[str] | None = None,
    other_prompts: Sequence[str] | None = None,
) -> list[Finding]:
    """The same of clips that were measured one by one, so that they need not be in memory together."""
    if not (teacher and other):
        raise ValueError(f"clips ({len(teacher)} of the teacher, {len(other)} others) must be of two sides: they are "
                         "told apart")  # fmt: skip
    unnamed = (f"\0{number}" for number in count())  # no prompt has a NUL
    teacher, teacher_keys = _distinct(teacher, teacher_prompts or [next(unnamed) for _ in teacher])
    other, other_keys = _distinct(other, other_prompts or [next(unnamed) for _ in other])
    labels = np.arange(len(teacher) + len(other)) < len(teacher)
    ask = partial(_finding, labels=labels, prompts=[*teacher_keys, *other_keys])
    findings = []
    same_form = teacher[0].shape == other[0].shape
    if not same_form:
        findings.append(form_finding(_form(teacher[0]), _form(other[0])))
    both = [*teacher, *other]
    for name, remedy in REMEDIES.items():
        names = sorted(set(teacher[0].values[name]) & set(other[0].values[name]))
        columns = np.array([[clip.values[name][trait] for trait in names] for clip in both])
        findings.append(ask(name, columns, remedy=partial(remedy, teacher, other)))
    if same_form:  # else a place of one is no place of the other
        columns = standing_out(both)
        findings.append(ask(WATERMARK, columns, remedy=partial(still_remedy, teacher, other)))
    return sorted(findings, key=_gravest_first)


def form_finding(teacher: Mapping[str, object], other: Mapping[str, object]) -> Finding:
    """That two forms differ, in what."""
    parts = [f"{name} {teacher[name]} against {other[name]}" for name in teacher if teacher[name] != other[name]]
    return Finding(FORM, "differs", remedy=f"{', '.join(parts)}: a judge sees it unless both are brought to one form, "
                   "and resizing leaves its own sharpness and noise")  # fmt: skip


def warnings(teacher_frames: FrameArray, base_frames: FrameArray, captions: Sequence[str]) -> list[str]:
    """Lines for the log of a run that starts: what tells the teacher's clips from its base's, one line each.

    Args:
        teacher_frames, base_frames: uint8 (N, T, H, W) or (N, T, H, W, 3).
        captions: N prompts; clip n of both sides is of the nth.
    Returns:
        Nothing where nothing is found; one line that says so where there are too few clips or frames.
    """
    chosen = spread(range(len(captions)), MOST_WARNED_OF)
    if len(chosen) < LEAST_CLIPS or min(teacher_frames.shape[1], base_frames.shape[1]) < LEAST_FRAMES:
        return [f"shortcuts are not looked for: {len(captions)} clips a side of {teacher_frames.shape[1]} frames, "
                f"{LEAST_CLIPS} clips of {LEAST_FRAMES} frames are needed"]  # fmt: skip
    prompts = [captions[place] for place in chosen]
    teacher, base = ([frames[place] for place in chosen] for frames in (teacher_frames, base_frames))
    return [_line(finding) for finding in probe(teacher, base, prompts, prompts) if finding.verdict != "no"]


def _line(finding: Finding) -> str:
    if finding.accuracy is None or finding.chance is None:
        return f"shortcut: {finding.name} {finding.verdict}: {finding.remedy}"
    return (f"shortcut: {finding.name} ({finding.verdict}) tells teacher from base in {finding.accuracy:.0%} of unseen "
            f"clips, chance up to {finding.chance:.0%}: {finding.remedy}")  # fmt: skip


def _finding(
    name: str,
    columns: NDArray[np.float64],
    labels: NDArray[np.bool_],
    prompts: Sequence[str],
    remedy: Callable[[], str],
) -> Finding:
    fewest = int(min(labels.sum(), (~labels).sum()))
    if fewest < LEAST_CLIPS:
        return Finding(name, "cannot tell", remedy=f"{fewest} different clips on a side: {LEAST_CLIPS} are needed")
    found = probe_traits(columns, labels, prompts)
    verdict = _verdict(found)
    said = remedy() if verdict in ("gives away", "slight") else ""
    if verdict == "cannot tell":
        said = "the sides share no prompts and have few: chance could do anything; compare clips of the same prompts"
    return Finding(name, verdict, found.accuracy, found.standard_error, found.chance, said)


def _verdict(found: Probed) -> Verdict:
    if found.chance >= 1:
        return "cannot tell"
    if found.accuracy <= found.chance:
        return "no"
    return "gives away" if found.accuracy >= GIVES_AWAY else "slight"


def _distinct(side: Sequence[Traits], prompts: Sequence[str]) -> tuple[list[Traits], list[str]]:
    """Without clips that are there already: one clip that is shown for two captions is no second witness."""
    seen: dict[tuple[object, ...], tuple[Traits, str]] = {}
    for clip, prompt in zip(side, prompts, strict=True):
        own = tuple(value for group in clip.values.values() for value in group.values())
        seen.setdefault((*own, clip.still.tobytes()), (clip, prompt))
    return [clip for clip, _ in seen.values()], [prompt for _, prompt in seen.values()]


def _form(clip: Traits) -> dict[str, object]:
    frames, height, width, channels = clip.shape
    return {"frames": frames, "size": f"{height}x{width}", "channels": channels}


def _gravest_first(finding: Finding) -> tuple[int, float]:
    order: tuple[Verdict, ...] = ("differs", "gives away", "slight", "cannot tell", "no")
    return order.index(finding.verdict), -(finding.accuracy or 0.0)
