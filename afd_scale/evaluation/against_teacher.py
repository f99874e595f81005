"""Clips of a source against the teacher's: what is measured of both sides, and the folder that shows it."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from afd_scale.codecs.codec import RejectedError, VideoForm
from afd_scale.config import ConfigError
from afd_scale.data.clips import Clip, Frames, Reject
from afd_scale.data.video import same_rate
from afd_scale.evaluation.clip_sets import (
    ClipSet,
    FolderClips,
    chosen_clips,
    common_form,
    frames_at,
    same_prompts,
    spread,
)
from afd_scale.evaluation.comparison import MeasuredClip, compare
from afd_scale.evaluation.comparison_page import markdown_tables, write_comparison_page
from afd_scale.evaluation.measuring import measure_set
from afd_scale.evaluation.report import provenance
from afd_scale.evaluation.suites.reward_model import METRIC as REWARD_METRIC
from afd_scale.evaluation.suites.reward_model import NAME as REWARD
from afd_scale.evaluation.suites.reward_model import RewardModel
from afd_scale.evaluation.suites.vbench import check_vbench, vbench_scores
from afd_scale.evaluation.suites.vbench import metric_of as vbench_metric
from afd_scale.evaluation.suites.video import LEAST_FRAMES, METRICS, chunk_borders
from afd_scale.evaluation.video import write_comparison_mp4
from afd_scale.progress import progress

Chunks = tuple[int | None, int]  # frames of a video's first chunk, where it has others, and of every other


@dataclass(frozen=True)
class Judges:
    """Who is asked beside the measures of the pixels; see the files of their suites."""

    reward: RewardModel | None
    vbench: str | None


def open_judges(reward_model: Path | None, vbench: str | None) -> Judges:
    """Load and check them.

    Args:
        reward_model: folder of a video-language model.
        vbench: Python of an environment that has VBench.
    Raises:
        ConfigError: one cannot judge.
    """
    if vbench is not None:
        check_vbench(vbench)
    return Judges(None if reward_model is None else RewardModel(reward_model), vbench)


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        result: of evaluation.json.
        samples: a few captions, each with a clip of the source and one of the teacher.
    """

    result: dict[str, Any]
    samples: list[tuple[str, Frames, Frames]]


def evaluate(
    source: ClipSet, teacher: ClipSet, judges: Judges, *, chunks: Chunks | None, most: int, samples: int, workers: int,
    lengths: int = 1,
) -> Evaluation:  # fmt: skip
    """Measure both sides in their common form, and compare.

    Args:
        lengths: of the teacher's clips, that the source's last at least; each of them is compared, too.
        chunks: of the source; None where they are not known.
        most: clips of a side.
        samples: that are shown.
        workers: processes that measure.
    Raises:
        ConfigError: the sides have too little in common, or a side no clip that can be used.
    """
    form = common_form(source, teacher)
    if form.frames < LEAST_FRAMES:
        raise ConfigError(f"source ({source.name}) and teacher ({teacher.name}) must share {LEAST_FRAMES} frames or "
                          f"more: they share {form.frames}")  # fmt: skip
    check_lengths(source, form, lengths)
    borders = None if chunks is None else borders_of(source, replace(form, frames=lengths * form.frames), chunks)
    chosen = chosen_clips(source, teacher, most)
    sides: dict[str, tuple[list[MeasuredClip], list[Reject]]] = {}
    benchmark: dict[str, Any] = {}
    for name, clip_set, clips in zip(("source", "teacher"), (source, teacher), chosen, strict=True):
        of_side = lengths if name == "source" else 1
        measured, rejects = measured_side(name, clip_set, clips, form, borders, workers, of_side)
        if judges.reward is not None:
            with progress(f"Rewards of the {name}") as on_clip:
                measured = with_values(measured, rewards(judges.reward, measured, clip_set, clips, form, on_clip))
        if judges.vbench is not None and isinstance(clip_set, FolderClips):
            scores = vbench_scores(judges.vbench, {clip_set.folder / clip.video: clip.prompt for clip in measured})
            of_video = {file.relative_to(clip_set.folder).as_posix(): found for file, found in scores.values.items()}
            measured = with_values(measured, of_video)
            benchmark[name] = {"standard": scores.standard, "dimensions": scores.dimensions}
        sides[name] = (measured, [*clip_set.rejects, *rejects])
    found = dict.fromkeys(name for measured, _ in sides.values() for clip in measured for name in clip.measures.values)
    known = {**METRICS, REWARD: REWARD_METRIC}
    metrics = {**METRICS, **{name: known.get(name) or vbench_metric(name) for name in found}}
    result = {
        **{name: side(clip_set, *sides[name]) for name, clip_set in (("source", source), ("teacher", teacher))},
        "form": asdict(form),
        "same_prompts": same_prompts(*chosen),
        "lengths": lengths,
        "chunk_borders": borders,
        "reward_model": judges.reward and str(judges.reward.folder),
        "vbench": benchmark,
        "metrics": {name: asdict(metric) for name, metric in metrics.items()},
        "splits": compare(sides["source"][0], sides["teacher"][0], metrics),
        "provenance": provenance(),
    }
    return Evaluation(result, sample_pairs(source, teacher, chosen, form, samples))


def check_lengths(source: ClipSet, form: VideoForm, lengths: int) -> None:
    """Raises ConfigError where the source's first video, in this form, is shorter."""
    frames = frames_at(source.form, form.fps)
    if lengths > 1 and frames < lengths * form.frames:
        raise ConfigError(f"lengths ({lengths}) must be at most {frames // form.frames}: the source's first video has "
                          f"{frames} frames, the teacher's {form.frames}, {form.fps:g} a second")  # fmt: skip


def borders_of(source: ClipSet, form: VideoForm, chunks: Chunks) -> tuple[int, ...]:
    first_chunk, chunk = chunks
    if not same_rate(form.fps, source.form.fps):
        raise ConfigError(f"chunk_frames ({chunk}) must not be given: the source's {source.form.fps:g} frames a second "
                          f"are made {form.fps:g}, as the teacher has")  # fmt: skip
    return chunk_borders(form.frames, chunk, first_chunk)


def side(clip_set: ClipSet, measured: Sequence[MeasuredClip], rejects: Sequence[Reject]) -> dict[str, Any]:
    return {
        "name": clip_set.name,
        "own_form": asdict(clip_set.form),
        "clips": [
            {"video": clip.video, "prompt": clip.prompt, "split": clip.split, **asdict(clip.measures)}
            for clip in measured
        ],
        "rejects": [asdict(reject) for reject in rejects],
    }


def measured_side(
    name: str,
    clip_set: ClipSet,
    clips: Sequence[Clip],
    form: VideoForm,
    borders: Sequence[int] | None,
    workers: int,
    lengths: int,
) -> tuple[list[MeasuredClip], list[Reject]]:
    """What was measured, one clip at least, and what could not be."""
    with progress(f"Clips of the {name}") as on_clip:
        processes = min(workers, len(clips))
        measured, rejects = measure_set(clip_set, clips, form, borders, processes, lengths, on_clip)
    if not measured:
        raise ConfigError(f"{name} ({clip_set.name}) must have a clip that can be used: all {len(clips)} were "
                          f"rejected, the first, {rejects[0].video} {rejects[0].reason}")  # fmt: skip
    return measured, rejects


def rewards(
    judge: RewardModel,
    measured: Sequence[MeasuredClip],
    clip_set: ClipSet,
    clips: Sequence[Clip],
    form: VideoForm,
    on_clip: Callable[[int, int], None],
) -> dict[str, dict[str, float]]:
    """Of each video that was measured."""
    usable = {clip.video for clip in measured}
    found: dict[str, dict[str, float]] = {}
    for clip, load in clip_set.loads([clip for clip in clips if clip.video in usable], form):
        found[clip.video] = {REWARD: judge.score(load(), clip.prompt, form.fps)}
        on_clip(len(found), len(usable))
    return found


def with_values(measured: Sequence[MeasuredClip], more: Mapping[str, Mapping[str, float]]) -> list[MeasuredClip]:
    """With further values, by video."""
    values = [{**clip.measures.values, **more.get(clip.video, {})} for clip in measured]
    return [
        replace(clip, measures=replace(clip.measures, values=own)) for clip, own in zip(measured, values, strict=True)
    ]


def sample_pairs(
    source: ClipSet, teacher: ClipSet, chosen: tuple[list[Clip], list[Clip]], form: VideoForm, most: int
) -> list[tuple[str, Frames, Frames]]:
    """A few captions, each with a clip of the source and one of the teacher, of the same prompt where there is one."""
    others = {clip.prompt: clip for clip in reversed(chosen[1])}
    paired = [(clip, others[clip.prompt]) for clip in chosen[0] if clip.prompt in others]
    shown = spread(paired or list(zip(*chosen, strict=False)), most)
    frames = [loaded(clip_set, column, form) for clip_set, column in zip((source, teacher), zip(*shown), strict=False)]
    pairs = []
    for first, second in shown:
        if first.video in frames[0] and second.video in frames[1]:
            caption = first.prompt if paired else f"source: {first.prompt}; teacher: {second.prompt}"
            pairs.append((caption, frames[0][first.video], frames[1][second.video]))
    return pairs


def loaded(clip_set: ClipSet, clips: Sequence[Clip], form: VideoForm) -> dict[str, Frames]:
    """Frames by video, of those that can be used."""
    frames = {}
    for clip, load in clip_set.loads(clips, form):
        try:
            frames[clip.video] = load()
        except RejectedError:
            continue  # named among the rejects already
    return frames


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Fill a folder with the page, the table, every number and the samples."""
    result = evaluation.result
    (folder / "evaluation.json").write_text(json.dumps(without_nan(result), indent=1) + "\n")
    (folder / "table.md").write_text(markdown_tables(result))
    if evaluation.samples:
        captions, *columns = zip(*evaluation.samples, strict=True)
        sides = {name: np.stack(column) for name, column in zip(("source", "teacher"), columns, strict=True)}
        clips = {name: frames[..., 0] if frames.shape[-1] == 1 else frames for name, frames in sides.items()}
        write_comparison_mp4(clips, captions, folder / "samples", result["form"]["fps"])
    write_comparison_page(result, sorted(folder.glob("samples/*.mp4")), folder / "evaluation.html")


def without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
