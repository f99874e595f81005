"""Clips that are measured: a folder of videos, or a dataset of shards, and how they are brought to one form."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from av.error import FFmpegError

from afd_scale.codecs.choose import codec_of
from afd_scale.codecs.cleaning import clean_prompt
from afd_scale.codecs.codec import RejectedError, VideoForm
from afd_scale.codecs.conversions import to_uint8
from afd_scale.config import ConfigError
from afd_scale.data.clips import Clip, Frames, Reject
from afd_scale.data.inspection import samples_at
from afd_scale.data.storage import Location
from afd_scale.data.teachers.folder import FolderTeacher
from afd_scale.data.teachers.prompts import prompt_id_of
from afd_scale.data.teachers.walk import VIDEO_SUFFIXES, videos_below
from afd_scale.data.validate import load_beside
from afd_scale.data.video import fit, own_form, same_rate
from afd_scale.evaluation.video import read_title

PROMPTS_TABLE = "prompts.jsonl"
_READ_AT_ONCE = 16  # samples of shards

Load = Callable[[], Frames]  # (T, H, W, C) in any process; raises RejectedError
Item = TypeVar("Item")


class ClipSet(Protocol):
    """One side of a comparison.

    Attributes:
        name: who made the clips.
        clips: what there is.
        rejects: what there would be, were it usable.
        form: that its clips have by themselves, as the first tells.
    """

    name: str
    clips: list[Clip]
    rejects: list[Reject]
    form: VideoForm

    def loads(self, clips: Sequence[Clip], form: VideoForm) -> Iterator[tuple[Clip, Load]]:
        """These clips in another form, in their order."""
        ...


class FolderClips:
    """Videos below a folder. Their prompts are in its `prompts.jsonl`, else in each file's title, else its name.

    Args:
        field: the user's setting that names the folder, for errors.
    Raises:
        ConfigError: it is no folder, or has no video that can be read.
    """

    def __init__(self, folder: Path, field: str):
        if not folder.is_dir():
            raise ConfigError(f"{field} ({folder}) must be a folder: there is none")
        table = folder / PROMPTS_TABLE
        self._teacher = FolderTeacher(folder, table)
        self.folder, self.name = folder, folder.resolve().name
        rows = self._teacher.clips() if table.exists() else titled_clips(folder)
        self.clips = [row for row in rows if isinstance(row, Clip)]
        self.rejects = [row for row in rows if isinstance(row, Reject)]
        self.form = self._first_form(folder, field)

    def loads(self, clips: Sequence[Clip], form: VideoForm) -> Iterator[tuple[Clip, Load]]:
        return ((clip, partial(self._teacher.frames, clip, form)) for clip in clips)

    def _first_form(self, folder: Path, field: str) -> VideoForm:
        """Of the first video that can be opened."""
        reasons = [reject.reason for reject in self.rejects]
        for clip in self.clips:
            try:
                return own_form(folder / clip.video)
            except RejectedError as error:
                reasons.append(f"{clip.video} {error}")
        found = f"none of {len(reasons)} can be read, the first: {reasons[0]}" if reasons else "there is none"
        raise ConfigError(f"{field} ({folder}) must hold videos ({', '.join(VIDEO_SUFFIXES)}): {found}")


class ShardClips:
    """The first clip of each prompt of a dataset.

    Args:
        models: of Wan's codec, see `codec_of`.
    Raises:
        ConfigError: the dataset cannot be used, or holds prompts alone.
    """

    def __init__(self, location: Location, models: str | None):
        facts, prompts, _ = load_beside(location)
        if facts.latent_shape is None:
            raise ConfigError(f"{location.field} ({location.shards}) must hold videos: it holds prompts alone")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.location, self._codec = location, codec_of(facts.codec, models=models, device=device)
        self.name = facts.teacher
        self.clips = [Clip(str(entry.sample), entry.prompt, entry.prompt_id, 0, entry.split) for entry in prompts]
        self.clips.sort(key=lambda clip: int(clip.video))
        self.rejects: list[Reject] = []
        first = samples_at(location, [int(self.clips[0].video)])[0]
        frames, height, width, channels = self._decoded(first).shape
        self.form = VideoForm(frames, first["fps"], height, width, colour="gray" if channels == 1 else "rgb24")

    def loads(self, clips: Sequence[Clip], form: VideoForm) -> Iterator[tuple[Clip, Load]]:
        ordered = sorted(clips, key=lambda clip: int(clip.video))
        for begin in range(0, len(ordered), _READ_AT_ONCE):
            part = ordered[begin : begin + _READ_AT_ONCE]
            rows = samples_at(self.location, [int(clip.video) for clip in part])
            for clip, row in zip(part, rows, strict=True):
                yield clip, partial(in_form, self._decoded(row), row["fps"], form)

    def _decoded(self, row: dict[str, np.ndarray]) -> Frames:
        return to_uint8(self._codec.decode(torch.tensor(row["latents"])[None]))[0]


def in_form(frames: Frames, fps: float, form: VideoForm) -> Frames:
    """Frames (T, H, W, C), so many a second, in another form that is not longer."""
    step = fps / form.fps
    step = 1.0 if same_rate(step, 1.0) else step
    return np.stack([fit(frames[int(at * step + 1e-3)], form) for at in range(form.frames)])


def titled_clips(folder: Path) -> list[Clip | Reject]:
    """The videos below a folder with their titles as prompts; a file's name stands in for a title that is absent."""
    videos, unread = videos_below(folder)
    clips: list[Clip | Reject] = [*unread]
    for path in videos:
        video = path.relative_to(folder).as_posix()
        try:
            prompt = clean_prompt(read_title(path)) or path.stem
        except (FFmpegError, OSError) as error:
            clips.append(Reject(video, path.stem, f"must be a readable video: {error.strerror}"))
        else:
            clips.append(Clip(video, prompt, prompt_id_of(prompt), 0))
    return clips


def common_form(source: ClipSet, teacher: ClipSet) -> VideoForm:
    """What both sides can be brought to without inventing pixels or frames: the lesser of the two, in each respect.

    Rates that are one but for rounding are taken as one.
    """
    forms = (source.form, teacher.form)
    smaller = min(forms, key=lambda form: form.height * form.width)
    fps = min(form.fps for form in forms)
    frames = min(frames_at(form, fps) for form in forms)
    grey = next((form for form in forms if form.colour == "gray"), smaller)
    return replace(smaller, frames=frames, fps=fps, colour=grey.colour)


def frames_at(form: VideoForm, fps: float) -> int:
    """That a video of this form has at another rate."""
    return form.frames if same_rate(form.fps, fps) else int(form.frames / form.fps * fps + 1e-3)


def chosen_clips(source: ClipSet, teacher: ClipSet, most: int) -> tuple[list[Clip], list[Clip]]:
    """At most so many clips of each side, spread evenly; where both have clips of the same prompts, these alone.

    A clip without a split is of the one that the other side has for its prompt.
    """
    split_of = {clip.prompt: clip.split for side in (source, teacher) for clip in side.clips if clip.split is not None}
    both = {clip.prompt for clip in source.clips} & {clip.prompt for clip in teacher.clips}
    if both:
        listed = dict.fromkeys(clip.prompt for clip in source.clips if clip.prompt in both)
        asked = set(spread(list(listed), most))
        sides = [_clips_of(asked, side.clips, most) for side in (source, teacher)]
    else:
        sides = [spread(side.clips, most) for side in (source, teacher)]
    first, second = ([replace(clip, split=clip.split or split_of.get(clip.prompt)) for clip in side] for side in sides)
    return first, second


def same_prompts(first: Sequence[Clip], second: Sequence[Clip]) -> bool:
    """Whether two sides are of the same prompts."""
    return {clip.prompt for clip in first} == {clip.prompt for clip in second}


def _clips_of(prompts: set[str], clips: Sequence[Clip], most: int) -> list[Clip]:
    """At most so many clips of these prompts, no more than there are clips: the first of each before any second."""
    number_of: Counter[str] = Counter()
    rounds: list[tuple[int, int, Clip]] = []
    for place, clip in enumerate(clips):
        if clip.prompt in prompts:
            rounds.append((number_of[clip.prompt], place, clip))
            number_of[clip.prompt] += 1
    return [clip for _, _, clip in sorted(rounds, key=lambda entry: entry[:2])[:most]]


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many, at even distances."""
    if len(items) <= most:
        return list(items)
    return [items[place] for place in np.linspace(0, len(items) - 1, most).round().astype(int)]
