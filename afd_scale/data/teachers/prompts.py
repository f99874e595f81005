"""Prompts as people keep them: JSONL, CSV, or a txt beside each video."""

import csv
import hashlib
import io
import json
import os
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afd_scale.codecs.codec import VideoForm
from afd_scale.config import ConfigError
from afd_scale.data.clips import Clip, Frames, Reject, Teacher
from afd_scale.files import system_errors

Row = dict[str, Any] | str  # fields of a row, or why there are none
VIDEO_SUFFIXES = (".mp4", ".webm", ".gif", ".mov", ".mkv", ".m4v", ".avi")
_PROMPT_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)
_NO_TEXT = re.compile(r"[\x00\ud800-\udfff]")  # no file name has NUL, and no UTF-8 has surrogates


@dataclass(frozen=True)
class PromptRow:
    """One row of a prompts file.

    Attributes:
        prompt: not empty; every run of white space and line ends is made one blank, and none is around it.
        prompt_id: given, or a hash of the prompt.
        video: file of the teacher's video, with one spelling (`os.path.normpath`); None where the row names none.
        split: name of a group of prompts; None where the row names none.
    """

    prompt: str
    prompt_id: str
    video: str | None = None
    split: str | None = None


class PromptsAlone(Teacher):
    """No teacher: prompts to roll out beside a teacher's, or held out for evaluation in named splits."""

    name = "none"

    def __init__(self, prompts: Path):
        self.prompts = prompts
        self.provenance: dict[str, Any] = {"name": self.name, "prompts": prompts.name}

    def clips(self) -> list[Clip | Reject]:
        rows = read_prompts(self.prompts, once=True)
        return [row if isinstance(row, Reject) else Clip(row.prompt_id, row.prompt, row.prompt_id, 0, row.split)
                for row in rows]  # fmt: skip

    def frames(self, clip: Clip, form: VideoForm) -> Frames:
        raise AssertionError("there are none")


def read_prompts(path: Path, *, once: bool = False) -> list[PromptRow | Reject]:
    """Read a prompts file; a row that cannot be used is a Reject in its place.

    Args:
        path: `.jsonl` of objects or `.csv` with a header, with the columns prompt, video, prompt_id and split; only
            prompt must be there. `.txt` of one prompt a line.
        once: each prompt; a row that repeats one is a Reject.
    Raises:
        ConfigError: the file cannot be read or is none of these.
    """
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".txt": _txt_rows}
    if path.suffix not in readers:
        raise ConfigError(f"prompts ({path}) must be one of {', '.join(readers)}: the suffix says how it is read")
    try:
        with system_errors(f"prompts ({path}) must be a readable file"):
            text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompts ({path}) must be UTF-8: byte {error.start} is not") from error
    rows = [_checked(row, f"{path.name}:{line}") for line, row in readers[path.suffix](text, path)]
    if not rows:
        raise ConfigError(f"prompts ({path}) must have at least one row: it is empty")
    return _consistent(rows, once)


def read_sidecars(folder: Path) -> list[PromptRow | Reject]:
    """The prompts of a folder's videos, each in a txt file of the video's name.

    Raises:
        ConfigError: the folder has no videos.
    """
    videos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if not videos:
        raise ConfigError(f"source ({folder}) must hold videos ({', '.join(VIDEO_SUFFIXES)}): there is none")
    rows: list[PromptRow | Reject] = []
    for video in videos:
        name = video.relative_to(folder).as_posix()
        place = name.encode(errors="backslashreplace").decode()  # names of files need not be UTF-8
        try:
            prompt = video.with_suffix(".txt").read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError):
            rows.append(Reject(place, "", f"prompt must lie beside it, in a readable {Path(place).stem}.txt"))
        else:
            rows.append(_checked({"video": name, "prompt": prompt}, place))
    return _consistent(rows)


def prompt_id_of(prompt: str) -> str:
    """A stable id of a prompt that was given none."""
    return hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()


def _jsonl_rows(text: str, path: Path) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would cut at U+2028, which JSON allows
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                yield number, f"must be a JSON object: {error}"
            except RecursionError:
                yield number, "must be a JSON object: it is nested too deeply"
            else:
                yield number, row if isinstance(row, dict) else "must be a JSON object with prompt"


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, Row]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey=None, strict=True)  # every header is a text
    try:
        if "prompt" not in (reader.fieldnames or ()):
            raise ConfigError(f"prompts ({path}) must have a column prompt in its first line: "
                              f"it has {reader.fieldnames}")  # fmt: skip
        for row in reader:
            yield reader.line_num, "must have as many values as the header" if None in row else row
    except csv.Error as error:
        raise ConfigError(f"prompts ({path}:{reader.line_num}) must be CSV: {error}") from error


def _txt_rows(text: str, path: Path) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, {"prompt": line}


def _checked(row: Row, place: str) -> PromptRow | Reject:
    """A row that stands by itself; `place` names it where its video does not."""
    if isinstance(row, str):
        return Reject(place, "", row)
    fields = {name: row.get(name) for name in ("prompt", "prompt_id", "video", "split")}
    for name, value in fields.items():
        if value is not None and not isinstance(value, str):
            return Reject(place, "", f"{name} ({reprlib.repr(value)}) must be a text")
        if value is not None and _NO_TEXT.search(value):
            return Reject(place, "", f"{name} ({reprlib.repr(value)}) must be a text: it has NUL or a lone surrogate")
    prompt = " ".join((fields["prompt"] or "").split())
    video = os.path.normpath(fields["video"]) if fields["video"] else None
    if not prompt:
        return Reject(video or place, "", "prompt must not be empty: the student reads it")
    prompt_id = fields["prompt_id"] or prompt_id_of(prompt)
    if not _PROMPT_ID.fullmatch(prompt_id):
        return Reject(video or place, prompt, f"prompt_id ({prompt_id!r}) must be letters, digits, '.', '_' and '-': "
                                              "it names files")  # fmt: skip
    return PromptRow(prompt, prompt_id, video, fields["split"] or None)


def _consistent(rows: list[PromptRow | Reject], once: bool = False) -> list[PromptRow | Reject]:
    """Refuse what contradicts or repeats an earlier row."""
    prompts: dict[str, str] = {}
    videos: set[str] = set()
    kept: list[PromptRow | Reject] = []
    for row in rows:
        if isinstance(row, PromptRow):
            reason = None
            if prompts.get(row.prompt_id, row.prompt) != row.prompt:
                reason = f"prompt_id ({row.prompt_id}) must name one prompt: an earlier row has another"
            elif once and row.prompt_id in prompts:
                reason = "prompt must occur once: an earlier row has it"
            elif row.video in videos:
                reason = "video must occur once: an earlier row has it"
            prompts.setdefault(row.prompt_id, row.prompt)
            if reason is not None:
                row = Reject(row.video or row.prompt_id, row.prompt, reason)
            elif row.video is not None:
                videos.add(row.video)
        kept.append(row)
    return kept
