"""Prompts as people keep them: in a table, or in a txt beside each video."""

import hashlib
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afd_scale.codecs.cleaning import clean_prompt
from afd_scale.codecs.codec import VideoForm
from afd_scale.config import ConfigError
from afd_scale.data.clips import Clip, Frames, Reject, Teacher
from afd_scale.data.teachers.tables import Row, Table, read_table
from afd_scale.data.teachers.walk import VIDEO_SUFFIXES, videos_below

FIELDS = ("prompt", "video", "prompt_id", "split")
LONGEST_TEXT = 1 << 17  # characters; the longest field of a CSV is as long
_PROMPT_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)
_NO_TEXT = re.compile(r"[\x00\ud800-\udfff]")  # no file name has NUL, and no UTF-8 has surrogates
_COLUMNS_SHOWN = 20


@dataclass(frozen=True)
class PromptRow:
    """One row of a prompts file.

    Attributes:
        prompt: cleaned by `clean_prompt`, not empty.
        prompt_id: given, or a hash of the prompt.
        video: file of the teacher's video, with one spelling (`os.path.normpath`); None where the row names none.
        split: name of a group of prompts; None where the row names none.
        written: the prompt as it was written, with single blanks, where cleaning changed it; else None.
    """

    prompt: str
    prompt_id: str
    video: str | None = None
    split: str | None = None
    written: str | None = None


class PromptsAlone(Teacher):
    """No teacher: prompts to roll out beside a teacher's, or held out for evaluation in named splits."""

    name = "none"

    def __init__(self, prompts: Path, columns: Mapping[str, str] | None = None):
        """Args: as `read_prompts` takes them."""
        self.prompts, self.columns = prompts, columns
        self.provenance: dict[str, Any] = {"name": self.name, "prompts": prompts.name}

    def clips(self) -> list[Clip | Reject]:
        rows = read_prompts(self.prompts, columns=self.columns, once=True)
        return [row if isinstance(row, Reject) else Clip(row.prompt_id, row.prompt, row.prompt_id, 0, row.split)
                for row in rows]  # fmt: skip

    def frames(self, clip: Clip, form: VideoForm) -> Frames:
        raise AssertionError("there are none")


def read_prompts(
    path: Path, *, needs: Sequence[str] = ("prompt",), columns: Mapping[str, str] | None = None, once: bool = False
) -> list[PromptRow | Reject]:
    """Read a table of prompts; a row that cannot be used is a Reject in its place.

    Args:
        path: `.jsonl` of objects, `.json` of a list of them, `.csv` with a header, `.parquet`, or `.txt` of one prompt
            a line.
        needs: those of FIELDS that must have a column, prompt among them.
        columns: field to the column that it is in, where the column has another name; None where the user has no
            option to say so.
        once: each prompt; a row that repeats one is a Reject.
    Raises:
        ConfigError: the file cannot be read, or lacks a column.
    """
    table = read_table(path)
    rows = checked_rows(table, f"prompts ({path})", needs, columns)
    if not rows:
        raise ConfigError(f"prompts ({path}) must have at least one row: it is empty")
    return consistent(rows, once)


def parse_columns(items: Sequence[str]) -> dict[str, str]:
    """Field to column, of texts such as `prompt=text,video=file_name`.

    Raises:
        ConfigError: an item has another form, or a field is unknown or named twice.
    """
    columns: dict[str, str] = {}
    for item in ",".join(items).split(",") if items else ():
        name, equals, column = item.partition("=")
        if name not in FIELDS or not equals or not column:
            raise ConfigError(f"columns ({item}) must be FIELD=COLUMN, FIELD one of {', '.join(FIELDS)}")
        if name in columns:
            raise ConfigError(f"columns ({item}) must name {name} once: it is in {columns[name]} already")
        columns[name] = column
    return columns


def read_sidecars(folder: Path) -> list[PromptRow | Reject]:
    """The prompts of a folder's videos, each in a txt file of the video's name; first what could not be looked into.

    Raises:
        ConfigError: the folder has no videos.
    """
    videos, unread = videos_below(folder)
    if not videos:
        why = f"; {unread[0].video} {unread[0].reason}" if unread else ""
        tars = "; .tar files are read with --teacher webdataset" if any(folder.glob("*.tar")) else ""
        raise ConfigError(f"source ({folder}) must hold videos ({', '.join(VIDEO_SUFFIXES)}): there is none{why}{tars}")
    rows: list[PromptRow | Reject] = [*unread]
    for video in videos:
        name = video.relative_to(folder).as_posix()
        place = name.encode(errors="backslashreplace").decode()  # names of files need not be UTF-8
        prompt = _sidecar(video)
        if prompt is None:
            rows.append(Reject(place, "", f"prompt must lie beside it, in a readable {Path(place).stem}.txt"))
        else:
            rows.append(_checked({"video": name, "prompt": prompt}, place, {"prompt": "prompt", "video": "video"}))
    return consistent(rows)


def _sidecar(video: Path) -> str | None:
    """The text beside a video; None where there is none that can be read."""
    beside = video.with_suffix(".txt")
    try:
        return beside.read_text(encoding="utf-8-sig") if beside.is_file() else None
    except (OSError, UnicodeDecodeError):
        return None


def prompt_id_of(prompt: str) -> str:
    """A stable id of a prompt that was given none."""
    return hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()


def checked_rows(
    table: Table, where: str, needs: Sequence[str], columns: Mapping[str, str] | None
) -> list[PromptRow | Reject]:
    """The rows of a table, each by itself; arguments as of `read_prompts`.

    Args:
        where: names the table in errors.
    Raises:
        ConfigError: a column is absent or there twice, or no row can be read.
    """
    if table.columns is None:
        for place, row in table.rows(()):
            raise ConfigError(f"{where} must have rows that can be read: the first, {place}, {row}")
        return []
    sources = _sources(table.columns, table.aliases, where, needs, columns)
    wanted = {source for name, source in sources.items() if name != "video" or "video" in needs}
    return [_checked(row, place, sources, needs) for place, row in table.rows(wanted)]


def _sources(
    there: Sequence[str], aliases: Mapping[str, str], where: str, needs: Sequence[str],
    columns: Mapping[str, str] | None,
) -> dict[str, str]:  # fmt: skip
    """Field to the column that it is in, of those that are there."""
    named = columns or {}
    expected = {name: aliases[name] if name not in there and aliases.get(name) in there else name for name in FIELDS}
    expected |= named
    sources = {name: source for name, source in expected.items() if source in there}
    for source in sources.values():
        if (times := there.count(source)) > 1:
            raise ConfigError(f"{where} must have one column {source}: it has {times}")
    absent = [name for name in FIELDS if (name in needs or name in named) and name not in sources]
    if absent:
        unnamed = ",".join(f"{name}=NAME" for name in absent if name not in named)
        hint = f"; --columns {unnamed} says which it is" if unnamed and columns is not None else ""
        raise ConfigError(f"{where} must have a column {expected[absent[0]]}: it has {_listed(there)}{hint}")
    return sources


def _listed(columns: Sequence[str]) -> str:
    """Names in one line; those that would not look like themselves, in quotes."""
    plain = [name if name.isprintable() and name == name.strip() != "" and len(name) < 80 else reprlib.repr(name)
             for name in columns[:_COLUMNS_SHOWN]]  # fmt: skip
    more = len(columns) - len(plain)
    return (", ".join(plain) + (f" and {more} more" if more else "")) or "none"


def _checked(row: Row, place: str, sources: Mapping[str, str], needs: Sequence[str] = FIELDS) -> PromptRow | Reject:
    """A row that stands by itself; `place` names it where its video does not."""
    if isinstance(row, str):
        return Reject(place, "", row)
    fields = {name: row.get(source) for name, source in sources.items()}
    if isinstance(fields["prompt"], list) and fields["prompt"]:
        fields["prompt"] = fields["prompt"][0]
    for name, value in fields.items():
        if name == "video" and name not in needs and not isinstance(value, str):
            fields[name] = None
        elif value is not None and (problem := _no_text(value)) is not None:
            return Reject(place, "", f"{name} ({reprlib.repr(value)}) must be a text{problem}")
    written = " ".join((fields["prompt"] or "").split())
    prompt = clean_prompt(fields["prompt"] or "")
    named = fields.get("video")
    video = os.path.normpath(named) if named else None
    if not prompt:
        return Reject(video or place, "", "prompt must not be empty: the student reads it")
    prompt_id = fields.get("prompt_id") or prompt_id_of(prompt)
    if not _PROMPT_ID.fullmatch(prompt_id):
        return Reject(video or place, prompt, f"prompt_id ({reprlib.repr(prompt_id)}) must be letters, digits, '.', "
                                              "'_' and '-': it names files")  # fmt: skip
    return PromptRow(prompt, prompt_id, video, fields.get("split") or None, None if written == prompt else written)


def _no_text(value: Any) -> str | None:
    """What keeps a value from being a text, to follow these words."""
    if not isinstance(value, str):
        return ""
    if _NO_TEXT.search(value):
        return ": it has NUL or a lone surrogate"
    return f" of at most {LONGEST_TEXT} characters: it has {len(value)}" if len(value) > LONGEST_TEXT else None


def consistent(rows: list[PromptRow | Reject], once: bool = False) -> list[PromptRow | Reject]:
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
