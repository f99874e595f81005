"""What is asked of a student, prompts and starts, and the files that it becomes."""

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from afd_scale.chunks import Chunks
from afd_scale.codecs.cleaning import clean_prompt
from afd_scale.codecs.codec import Codec, RejectedError, VideoForm
from afd_scale.codecs.conversions import to_unit
from afd_scale.config import ConfigError
from afd_scale.config.errors import shown
from afd_scale.config.models import StudentConfig
from afd_scale.config.sampler import SamplerConfig
from afd_scale.data.clips import Frames, Reject
from afd_scale.data.inspection import samples_at
from afd_scale.data.reader import prompts_of
from afd_scale.data.schema import DatasetFacts
from afd_scale.data.storage import Location
from afd_scale.data.teachers.prompts import prompt_id_of, read_prompts
from afd_scale.data.teachers.tables import read_table
from afd_scale.data.validate import load_beside
from afd_scale.data.video import fit, read_video
from afd_scale.evaluation.video import write_grid
from afd_scale.files import LONGEST_NAME, slug
from afd_scale.generation.generate import Request
from afd_scale.types import Prompts

log = logging.getLogger(__name__)

LAYOUTS = ("plain", "vbench")
_SHEET_FRAMES, _SHEET_PIXELS = 8, 120  # of a video on a contact sheet: how many, how large


@dataclass(frozen=True)
class Script:
    """What a video is asked for.

    Attributes:
        prompt: that names it, and that it is made of unless there is a schedule.
        schedule: the frame of the video at which each of its prompts begins, and the prompts.
    Raises:
        ConfigError: the frames do not rise from 0, or a prompt is empty.
    """

    prompt: str
    schedule: tuple[tuple[int, str], ...] = ()

    def __post_init__(self) -> None:
        frames, named = [frame for frame, _ in self.schedule], f"schedule ({shown(self.schedule)})"
        if frames and (frames[0] != 0 or any(later <= earlier for earlier, later in pairwise(frames))):
            raise ConfigError(f"{named} must begin at frame 0 and rise: each prompt begins after the one before it")
        if not all(text for _, text in self.schedule):
            raise ConfigError(f"{named} must have no empty prompt: the student reads it")

    @property
    def texts(self) -> tuple[str, ...]:
        """All that it is made of."""
        return tuple(text for _, text in self.schedule) or (self.prompt,)


def scripts_of_file(path: Path) -> list[Script]:
    """The prompts of a table, each once; a column `schedule` says how they change: `[[0, "..."], [81, "..."]]`.

    Raises:
        ConfigError: the file cannot be read, or a row cannot be used.
    """
    rows, table = read_prompts(path), read_table(path)
    has_schedule = table.columns is not None and "schedule" in table.columns
    places = table.rows({"schedule"}) if has_schedule else ((path.name, {}) for _ in rows)
    scripts = []
    for row, (place, fields) in zip(rows, places, strict=True):
        if isinstance(row, Reject):
            raise ConfigError(f"prompts ({path}): {row.video}: {row.reason}")
        schedule = fields.get("schedule") if isinstance(fields, dict) else None
        try:
            scripts.append(Script(row.prompt, () if schedule is None else schedule_of(schedule)))
        except ConfigError as error:
            raise ConfigError(f"prompts ({path}): {place}: {error}") from error
    return list(dict.fromkeys(scripts))


def schedule_of(value: Any) -> tuple[tuple[int, str], ...]:
    """A schedule as a table has it, its prompts cleaned.

    Raises:
        ConfigError: it is no list of frames and prompts.
    """
    rows = [tuple(row) for row in value if isinstance(row, list)] if isinstance(value, list) else []
    pairs = [row for row in rows if len(row) == 2 and type(row[0]) is int and isinstance(row[1], str)]
    if not pairs or len(pairs) != len(value):
        raise ConfigError(f"schedule ({shown(value)}) must be a list of [frame, prompt]: numbers and texts")
    return tuple((frame, clean_prompt(text)) for frame, text in pairs)


def chunks_of_schedule(script: Script, frames: int, codec: Codec, chunks: Chunks) -> tuple[int, ...]:
    """The chunks at which a script's prompts begin, in a video of so many frames: at a frame's own, or the next border.

    Raises:
        ConfigError: a prompt begins beyond the video's last chunk, or where another does.
    """
    starts, borders = list[int](), [0]  # frames at which chunks begin
    while (border := codec.frames(chunks.start(len(borders)))) < frames:
        borders.append(border)
    for frame, text in script.schedule:
        chunk = bisect_left(borders, frame)
        if chunk == len(borders):
            raise ConfigError(f"schedule (frame {frame}) must be {borders[-1]} at the latest: in a video of {frames} "
                              "frames the last chunk begins there")  # fmt: skip
        if chunk in starts:
            raise ConfigError(f"schedule (frame {frame}) must leave each prompt a chunk: the one before it begins at "
                              f"frame {borders[chunk]} too")  # fmt: skip
        if borders[chunk] != frame:
            log.info("the prompt of frame %d begins at frame %d, with a chunk: %s", frame, borders[chunk], shown(text))
        starts.append(chunk)
    return tuple(starts)


@dataclass(frozen=True)
class DatasetPrompts:
    """The prompts of a dataset, each once, the dataset's facts, and its videos' frames a second, if it has any.

    Attributes:
        starts: (P, f, C, H, W) clean latents that its videos of these begin with; None where none were asked for.
    """

    prompts: Prompts
    facts: DatasetFacts
    fps: float | None
    starts: Tensor | None


def read_dataset(
    location: Location, split: str | None, student: StudentConfig, start_frames: int = 0
) -> DatasetPrompts:  # fmt: skip
    """Prompts as a dataset has them embedded; of its shards those are read that hold a prompt's first sample.

    Args:
        start_frames: latent frames of `starts`; 0 asks for none. A dataset of prompts alone has none.
    Raises:
        ConfigError: the dataset cannot be read, has no such split, or embeddings of another width.
    """
    facts, listed, _ = load_beside(location)
    positions = sorted(prompt.sample for prompt in listed if split in (None, prompt.split))
    if not positions:
        raise ConfigError(f"split ({split}) must be one of {sorted({str(p.split) for p in listed} - {'None'})}, the "
                          f"splits of {location.shards}")  # fmt: skip
    if facts.text_shape[1] != student.text_dim or facts.text_shape[0] > student.text_length:
        raise ConfigError(f"dataset ({location.shards}) must have text of at most {student.text_length} rows of "
                          f"{student.text_dim}, as the student reads: it has {facts.text_shape}")  # fmt: skip
    rows = [{**row, "sample": at} for at, row in zip(positions, samples_at(location, positions), strict=True)]
    starts = None
    if start_frames and facts.latent_shape is not None:
        starts = torch.from_numpy(np.stack([row["latents"][:start_frames] for row in rows])).float()
    return DatasetPrompts(prompts_of(rows, student.text_length), facts, rows[0].get("fps"), starts)


def embedded(texts: Sequence[str], codec: Codec, student: StudentConfig) -> Prompts:
    """Prompts, cleaned, with their embeddings, padded to the student's text length.

    Raises:
        ConfigError: a prompt cannot be embedded, or not for this student.
    """
    text_length, text_dim = student.text_length, student.text_dim
    if codec.text_shape[1] != text_dim:
        raise ConfigError(f"models must give embeddings of {text_dim} numbers, as student.text_dim says: "
                          f"{codec.name} gives {codec.text_shape[1]}")  # fmt: skip
    texts = [clean_prompt(text) for text in texts]
    embeddings = torch.zeros(len(texts), text_length, text_dim)
    for row, text in zip(embeddings, texts, strict=True):
        try:
            rows = codec.embed(text)[:text_length]
        except RejectedError as error:
            raise ConfigError(f"prompt ({text}): {error}") from error
        row[: len(rows)] = torch.from_numpy(rows.astype(np.float32))
    return Prompts(tuple(texts), tuple(map(prompt_id_of, texts)), tuple(range(len(texts))), embeddings)


def requests_of(texts: Sequence[str], num_videos: int, out: Path, layout: str) -> list[Request]:
    """A request for each video, prompt by prompt.

    Args:
        layout: `plain` numbers the files; `vbench` names them `<prompt>-<number>.mp4`, as VBench looks for them.
    Raises:
        ConfigError: a name is no file's, or of two videos.
    """
    requests = []
    if layout == "vbench" and (twice := [text for text, times in Counter(texts).items() if times > 1]):
        raise ConfigError(f"prompt ({twice[0]}) must be given once with layout vbench, which names files by it: "
                          "num_videos says how many of each")  # fmt: skip
    for prompt, text in enumerate(texts):
        for number in range(num_videos):
            if layout == "vbench":
                name = f"{text}-{number}.mp4"
                if "/" in name or len(name.encode()) > LONGEST_NAME:
                    raise ConfigError(f"prompt ({text}) must name a file with layout vbench: it is too long or has a /")
            else:
                name = f"{prompt:04d}_{slug(text)}" + (f"_{number}" if num_videos > 1 else "") + ".mp4"
            requests.append(Request(prompt, prompt * num_videos + number, out / name))
    return requests


def whole_chunks(frames: int, codec: Codec, chunks: Chunks) -> int:
    """The fewest latent frames that are whole chunks and give so many frames."""
    return next(latent for latent in map(chunks.start, count(1)) if codec.frames(latent) >= frames)


def start_of_image(path: Path, form: VideoForm, codec: Codec, sampler: SamplerConfig) -> Tensor:
    """(1, 1, C, H, W) latents of an image, a first chunk of one frame.

    Raises:
        ConfigError: it cannot be read, or this student's first chunk is no single frame.
    """
    first = codec.frames(sampler.chunks.start(1))
    if first != 1:
        raise ConfigError(f"image ({path}) must be for a student whose first chunk is one frame: this one's has "
                          f"{first}; give a video of as many")  # fmt: skip
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L" if form.colour == "gray" else "RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise ConfigError(f"image ({path}) must be a readable image: {error}") from error
    return _encoded(fit(pixels.reshape(*pixels.shape[:2], -1), form)[None], codec)


def start_of_video(path: Path, chunks: int, form: VideoForm, codec: Codec, sampler: SamplerConfig) -> Tensor:
    """(1, f, C, H, W) latents of the start of a video, so many whole chunks.

    Raises:
        ConfigError: it cannot be read, or is too short.
    """
    frames = codec.frames(sampler.chunks.start(chunks))
    try:
        return _encoded(read_video(path, replace(form, frames=frames)), codec)
    except RejectedError as error:
        raise ConfigError(f"video ({path}): {error}") from error


def write_contact_sheet(videos: Mapping[Path, str], form: VideoForm, path: Path) -> None:
    """Write one png of files that were written in one form: a row for each, with its prompt.

    Args:
        videos: file to prompt.
    """
    shrink = -(-max(form.height, form.width) // _SHEET_PIXELS)
    shown = min(form.frames, _SHEET_FRAMES)
    small = replace(form, frames=shown, fps=form.fps * shown / form.frames, height=form.height // shrink,
                    width=form.width // shrink, aspect="stretch", colour="rgb24")  # fmt: skip
    write_grid({"generated": np.stack([read_video(video, small) for video in videos])}, list(videos.values()), path)


def _encoded(frames: Frames, codec: Codec) -> Tensor:
    return codec.encode(to_unit(frames)[None])
