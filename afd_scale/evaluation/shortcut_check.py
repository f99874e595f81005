"""Shortcuts between two sets of clips: read in one form, measured one by one, and what is said of it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from afd_scale.codecs.codec import RejectedError, VideoForm
from afd_scale.config import ConfigError
from afd_scale.data.clips import Clip, Reject
from afd_scale.data.video import same_rate
from afd_scale.evaluation.clip_sets import ClipSet, ShardClips, chosen_clips, common_form, same_prompts
from afd_scale.evaluation.run_clips import RunClips
from afd_scale.evaluation.shortcuts import Finding, form_finding, probe_measured
from afd_scale.evaluation.traits import LEAST_FRAMES, Traits, traits_of
from afd_scale.progress import progress


@dataclass(frozen=True)
class Checked:
    """What was found between two sets.

    Attributes:
        names: of the teacher and the other side.
        clips: that were measured of each.
        form: that both were brought to.
        same_prompts: whether both sides are of the same.
        findings: the gravest first.
        rejects: clips of either side that could not be used.
        notes: what to know before the findings are believed.
    """

    names: tuple[str, str]
    clips: tuple[int, int]
    form: VideoForm
    same_prompts: bool
    findings: list[Finding]
    rejects: list[Reject]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def check_shortcuts(teacher: ClipSet, other: ClipSet, most: int) -> Checked:
    """Look for what tells two sets apart.

    Args:
        most: clips of a side.
    Raises:
        ConfigError: they share too few frames, or a side has no clip that can be used.
    """
    form = common_form(other, teacher)
    if form.frames < LEAST_FRAMES:
        raise ConfigError(f"against ({other.name}) and out ({teacher.name}) must share {LEAST_FRAMES} frames or more: "
                          f"they share {form.frames}")  # fmt: skip
    others, teachers = chosen_clips(other, teacher, most)
    teacher_traits, teacher_prompts, rejects = _measured("teacher", teacher, teachers, form)
    other_traits, other_prompts, other_rejects = _measured("other side", other, others, form)
    findings = probe_measured(teacher_traits, other_traits, teacher_prompts, other_prompts)
    own = [_own_form(side.form) for side in (teacher, other)]
    if not same_rate(teacher.form.fps, other.form.fps) or own[0] | {"fps": 0} != own[1] | {"fps": 0}:
        findings.insert(0, form_finding(*own))
    clips = (len(teacher_traits), len(other_traits))
    paired = same_prompts(others, teachers)
    return Checked(
        (teacher.name, other.name), clips, form, paired, findings,
        [*teacher.rejects, *other.rejects, *rejects, *other_rejects], _notes(teacher, other, paired),
    )  # fmt: skip


def _measured(
    name: str, clip_set: ClipSet, clips: Sequence[Clip], form: VideoForm
) -> tuple[list[Traits], list[str], list[Reject]]:
    """Traits and prompts of what could be used, and what could not."""
    traits, prompts, rejects = [], [], []
    with progress(f"Clips of the {name}") as on_clip:
        for done, (clip, load) in enumerate(clip_set.loads(clips, form), 1):
            try:
                traits.append(traits_of(load()))
                prompts.append(clip.prompt)
            except RejectedError as error:
                rejects.append(Reject(clip.video, clip.prompt, str(error)))
            on_clip(done, len(clips))
    if not traits:
        raise ConfigError(f"{name} ({clip_set.name}) must have a clip that can be used: all {len(clips)} were "
                          f"rejected, the first, {rejects[0].video} {rejects[0].reason}")  # fmt: skip
    return traits, prompts, rejects


def _own_form(form: VideoForm) -> dict[str, object]:
    return {"frames": form.frames, "size": f"{form.height}x{form.width}", "fps": round(form.fps, 3)}


def _notes(teacher: ClipSet, other: ClipSet, paired: bool) -> list[str]:
    notes = []
    if isinstance(other, RunClips) and other.unknown:
        notes.append(f"the prompts of the other side are not known: {other.unknown}")
    if not paired:
        notes.append("the sides are of other prompts: what differs may be what was asked for")
    if isinstance(teacher, ShardClips) != isinstance(other, ShardClips | RunClips):
        notes.append("one side is read from compressed files, the other is not: sharpness, noise and compression may "
                     "be of the files, and not of what a run sees")  # fmt: skip
    return notes


def table(checked: Checked) -> str:
    """The findings at a glance, the remedies below."""
    form = checked.form
    lines = [
        f"{checked.clips[0]} clips of {checked.names[0]} against {checked.clips[1]} of {checked.names[1]}, at "
        f"{form.frames} frames of {form.height}x{form.width}, {form.fps:g} a second",
        "",
        f"{'shortcut':13}{'verdict':13}{'told apart':15}by chance",
    ]
    for finding in checked.findings:
        told = chance = "-"
        if finding.accuracy is not None and finding.standard_error is not None and finding.chance is not None:
            told = f"{finding.accuracy:.0%} +- {finding.standard_error:.0%}"
            chance = f"up to {finding.chance:.0%}"
        lines.append(f"{finding.name:13}{finding.verdict:13}{told:15}{chance}")
    named: dict[str, list[str]] = {}
    for finding in checked.findings:
        named.setdefault(finding.remedy, []).append(finding.name)
    remedies = [f"{', '.join(names)}: {remedy}" for remedy, names in named.items() if remedy]
    rejected = [f"rejected: {len(checked.rejects)}, the first: {reject.video} {reject.reason}"
                for reject in checked.rejects[:1]]  # fmt: skip
    parts = [lines, remedies, [*(f"note: {note}" for note in checked.notes), *rejected]]
    return "\n\n".join("\n".join(part) for part in parts if part)
