"""Measure videos against the teacher's: motion, flicker, sharpness, drift, jumps at chunk borders.

    tools/evaluate.py runs/toy-afd --teacher SHARDS --out DIR
    tools/evaluate.py SOURCE --teacher FOLDER --out DIR

SOURCE is a folder of videos; or a run, checkpoint or export, which makes videos of the teacher's prompts first, as
tools/generate.py does, and leaves them in DIR/videos. A folder's prompts are in its prompts.jsonl
({"video": "a.mp4", "prompt": "...", "split": "..."}), else in the titles of its videos.

Both sides are brought to one form, the lesser of the two in size, frame rate and length; where the teacher has clips
of the source's prompts, these are compared. Latents of Wan's codec need its VAE: --models DIR, as for make_shards.
Jumps at chunk borders are measured of what is made here, and of a folder where --chunk-frames says how many frames a
chunk has (Wan with chunks of 3 latent frames: --chunk-frames 12 --first-chunk-frames 9). --reward-model asks a
video-language model of transformers, by path, whether each clip shows its prompt. --vbench runs VBench on folders, in
its own environment.

DIR gets evaluation.json (everything), table.md, evaluation.html and samples/. docs/evaluation.md defines the measures.

Exit 0: done. Exit 2: bad input, one line says which, and DIR is not made.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from afd_scale.checkpoint.weights import written_whole
from afd_scale.codecs.codec import RejectedError, VideoForm
from afd_scale.config import ConfigError
from afd_scale.config.command_line import Parser
from afd_scale.data.clips import Clip, Frames, Reject
from afd_scale.data.schema import FACTS_FILE, INDEX_FILE
from afd_scale.data.storage import Location, is_remote
from afd_scale.evaluation.clip_sets import ClipSet, FolderClips, ShardClips, chosen_clips, common_form, spread
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
from afd_scale.files import system_errors
from afd_scale.generation.job import Job, generate
from afd_scale.parallel.ranks import alone
from afd_scale.progress import progress


def parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="folder of videos")
    add("--teacher", required=True, metavar="SHARDS|FOLDER", help="dataset (folder or URL), or folder of videos")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write; must not exist")
    add("--models", help="folder or hub id of Wan in diffusers' layout, for shards of its codec")
    add("--chunk-frames", type=count, help="of a chunk of the source, in frames of its videos")
    add("--first-chunk-frames", type=count, help="of the first, where it has others")
    add("--reward-model", type=Path, metavar="PATH", help="folder of a video-language model that is asked as well")
    add("--vbench", metavar="PYTHON", help="Python of an environment that has VBench, which judges folders as well")
    add("--seed", type=int, default=0, help="of what is generated (%(default)s)")
    add("--clips", type=count, default=512, help="of a side at most, spread evenly (%(default)s)")
    add("--samples", type=count_or_none, default=4, help="of them side by side on the page (%(default)s)")
    add("--workers", type=count, default=os.cpu_count(), help="processes that measure (%(default)s)")
    add("--json", action="store_true", help="print evaluation.json, not the table")
    return parser


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"({text}) must be at least 1")
    return value


def count_or_none(text: str) -> int:
    return 0 if text == "0" else count(text)


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        check_out(options.out)
        with tempfile.TemporaryDirectory(dir=options.out.parent, prefix=f".{options.out.name}.") as folder:
            made = Path(folder) / "videos"
            teacher = open_teacher(options.teacher, options.models, Path(folder))
            source = open_source(options, teacher, made)
            result, samples = evaluate(source, teacher, options)
            write(result, samples, options.out, made)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print((options.out / ("evaluation.json" if options.json else "table.md")).read_text(), end="")
    return 0


def check_out(out: Path) -> None:
    """Before anything is measured, which may take hours."""
    if out.exists():
        raise ConfigError(f"out ({out}) must not exist: nothing is overwritten")
    with system_errors(f"out ({out}) must be in a folder that can be written to"):
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()


def open_source(options: argparse.Namespace, teacher: ClipSet, made: Path) -> ClipSet:
    """The clips that are judged; a policy's are made first.

    Raises:
        ConfigError: there are none.
    """
    if not options.source.exists():
        raise ConfigError(f"source ({options.source}) must exist: there is no such file or folder")
    if options.source.is_dir() and not is_policy(options.source):
        return FolderClips(options.source, "source")
    form, shards = teacher.form, teacher.location if isinstance(teacher, ShardClips) else None
    prompts = () if shards else tuple(dict.fromkeys(clip.prompt for clip in teacher.clips))
    job = Job(
        options.source, made, prompt=prompts, dataset=shards, max_prompts=options.clips,
        frames=form.frames, size=f"{form.height}x{form.width}", fps=form.fps, seed=options.seed, models=options.models,
    )  # fmt: skip
    found = generate(job, alone())
    assert found is not None, "this is the only rank"
    if options.chunk_frames is None:
        options.first_chunk_frames, options.chunk_frames = found["chunk_frames"]
    clips = FolderClips(made, "source")
    clips.name = options.source.resolve().name
    return clips


def is_policy(folder: Path) -> bool:
    """Whether a run, checkpoint or export is here, of whatever layout."""
    marks = ("config.yaml", "config.json", "model_index.json", "state.json", "*.safetensors", "*/*.safetensors")
    return any(next(folder.glob(mark), None) for mark in marks)


def open_teacher(place: str, models: str | None, cache: Path) -> ClipSet:
    if is_remote(place) or any((Path(place) / name).exists() for name in (FACTS_FILE, INDEX_FILE)):
        return ShardClips(Location(place, cache, "teacher"), models)
    return FolderClips(Path(place), "teacher")


def evaluate(
    source: ClipSet, teacher: ClipSet, options: argparse.Namespace
) -> tuple[dict[str, Any], list[tuple[str, Frames, Frames]]]:
    """What goes into evaluation.json, and a few captions with the clips of source and teacher."""
    form = common_form(source, teacher)
    if form.frames < LEAST_FRAMES:
        raise ConfigError(f"source ({source.name}) and teacher ({teacher.name}) must share {LEAST_FRAMES} frames or "
                          f"more: they share {form.frames}")  # fmt: skip
    borders = borders_of(source, form, options)
    judge = None if options.reward_model is None else RewardModel(options.reward_model)
    if options.vbench is not None:
        check_vbench(options.vbench)
    chosen = chosen_clips(source, teacher, options.clips)
    sides: dict[str, tuple[list[MeasuredClip], list[Reject]]] = {}
    benchmark: dict[str, Any] = {}
    for name, clip_set, clips in zip(("source", "teacher"), (source, teacher), chosen, strict=True):
        measured, rejects = measured_side(name, clip_set, clips, form, borders, options.workers)
        if judge is not None:
            with progress(f"Rewards of the {name}") as on_clip:
                measured = with_values(measured, rewards(judge, measured, clip_set, clips, form, on_clip))
        if options.vbench is not None and isinstance(clip_set, FolderClips):
            scores = vbench_scores(options.vbench, {clip_set.folder / clip.video: clip.prompt for clip in measured})
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
        "same_prompts": all(clip.prompt in {other.prompt for other in chosen[0]} for clip in chosen[1]),
        "chunk_borders": borders,
        "reward_model": options.reward_model and str(options.reward_model),
        "vbench": benchmark,
        "metrics": {name: asdict(metric) for name, metric in metrics.items()},
        "splits": compare(sides["source"][0], sides["teacher"][0], metrics),
        "provenance": provenance(),
    }
    return result, sample_pairs(source, teacher, chosen, form, options.samples)


def borders_of(source: ClipSet, form: VideoForm, options: argparse.Namespace) -> tuple[int, ...] | None:
    if options.chunk_frames is None:
        if options.first_chunk_frames is not None:
            raise ConfigError(
                f"first_chunk_frames ({options.first_chunk_frames}) must not be given without chunk_frames"
            )
        return None
    if not math.isclose(form.fps, source.form.fps):
        raise ConfigError(f"chunk_frames ({options.chunk_frames}) must not be given: the source's {source.form.fps:g} "
                          f"frames a second are made {form.fps:g}, as the teacher has")  # fmt: skip
    return chunk_borders(form.frames, options.chunk_frames, options.first_chunk_frames)


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
) -> tuple[list[MeasuredClip], list[Reject]]:
    """What was measured, one clip at least, and what could not be."""
    with progress(f"Clips of the {name}") as on_clip:
        measured, rejects = measure_set(clip_set, clips, form, borders, min(workers, len(clips)), on_clip)
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


def write(result: dict[str, Any], samples: Sequence[tuple[str, Frames, Frames]], out: Path, videos: Path) -> None:
    """The folder, whole or not at all.

    Args:
        videos: that were generated, if there are any.
    """
    with written_whole(out) as partial:
        partial.mkdir()
        if videos.is_dir():
            videos.rename(partial / "videos")
        (partial / "evaluation.json").write_text(json.dumps(without_nan(result), indent=1) + "\n")
        (partial / "table.md").write_text(markdown_tables(result))
        if samples:
            captions, *columns = zip(*samples, strict=True)
            sides = {name: np.stack(column) for name, column in zip(("source", "teacher"), columns, strict=True)}
            clips = {name: frames[..., 0] if frames.shape[-1] == 1 else frames for name, frames in sides.items()}
            write_comparison_mp4(clips, captions, partial / "samples", result["form"]["fps"])
        write_comparison_page(result, sorted(partial.glob("samples/*.mp4")), partial / "evaluation.html")


def without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
