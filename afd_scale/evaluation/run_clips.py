"""Clips that a run kept of its base student, as one side of a comparison."""

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from afd_scale.codecs.codec import RejectedError, VideoForm
from afd_scale.config import ConfigError, load_config
from afd_scale.data.clips import Clip, Frames, Reject
from afd_scale.data.schema import PromptEntry, load_prompts
from afd_scale.data.storage import evaluation_prompts, fetch_facts
from afd_scale.evaluation.clip_sets import Load, in_form
from afd_scale.evaluation.kept_clips import kept, read_clips
from afd_scale.evaluation.runs import run_folder

BASE = Path("samples/base.safetensors")


class RunClips:
    """What the base student of a run made before it was trained.

    Args:
        run: its folder.
        fps: of its teacher's videos, which are its base's too.
        cache: folder for what is fetched to know its prompts.
        field: the user's setting that names the run, for errors.
    Attributes:
        unknown: why the prompts are not known; empty where they are. Each clip then counts as of its own prompt.
    Raises:
        ConfigError: it kept none, or they cannot be read.
    """

    def __init__(self, run: Path, fps: float, cache: Path, field: str):
        self._path, self._fps = run / BASE, fps
        if not self._path.is_file():
            raise ConfigError(f"{field} ({run}) must have {BASE}, its base's clips, which a run keeps where it "
                              "measures or shows clips: there are none; make videos with tools/generate.py and "
                              "give their folder")  # fmt: skip
        shape, facts = kept(self._path, field)
        self.name = f"the base of {run.resolve().name}"
        self.rejects: list[Reject] = []
        colour = "gray" if len(shape) == 4 else "rgb24"
        self.form = VideoForm(shape[1], fps, shape[2], shape[3], colour=colour)  # type: ignore[arg-type]
        self.unknown, prompts = "", []
        try:
            prompts = _prompts(run, cache)
        except ConfigError as error:
            self.unknown = str(error)
        numbers = _numbers(facts.get("clips"), shape[0])
        self.clips = [_clip(row, number, prompts) for row, number in enumerate(numbers)]

    def loads(self, clips: Sequence[Clip], form: VideoForm) -> Iterator[tuple[Clip, Load]]:
        return ((clip, partial(self._load, int(clip.video), form)) for clip in clips)

    def _load(self, row: int, form: VideoForm) -> Frames:
        frames = read_clips(self._path, {}, [row])
        if frames is None:
            raise RejectedError(f"must be readable: {self._path} was replaced or removed")
        clip = frames[0]
        return in_form(clip[..., None] if clip.ndim == 3 else clip, self._fps, form)


def side_by_side(path: Path) -> bool:
    """Whether a folder is of a run's sample videos, each of which shows teacher and students next to each other."""
    run = run_folder(path)
    return run is not None and path.absolute().is_relative_to(run.absolute() / "samples")


def _prompts(run: Path, cache: Path) -> list[PromptEntry]:
    """What the clips of a run are asked for, in the order that `Evaluator` counts them in."""
    config = load_config(run / "config.yaml")
    location = replace(evaluation_prompts(config), cache=cache)
    fetch_facts(location)
    split = config.evaluation.split
    return [entry for entry in load_prompts(location.folder, location.field) if split in (None, entry.split)]


def _clip(row: int, number: int, prompts: Sequence[PromptEntry]) -> Clip:
    if not prompts:
        return Clip(str(row), f"clip {number}", f"clip {number}", 0)
    entry = prompts[number % len(prompts)]
    return Clip(str(row), entry.prompt, entry.prompt_id, number // len(prompts), entry.split)


def _numbers(said: str | None, clips: int) -> list[int]:
    """Of the clips, as the run counted them: `range(0, 192)`, or a list of those that are shown."""
    if said is not None and re.fullmatch(r"\[[\d, ]*\]", said):
        numbers = ast.literal_eval(said)
        if len(numbers) == clips:
            return list(numbers)
    return list(range(clips))
