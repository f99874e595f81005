"""Videos and their prompts in tars, as WebDataset keeps them: members that share a key are one sample."""

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from afd_scale.codecs.codec import RejectedError, VideoForm
from afd_scale.config import ConfigError
from afd_scale.data.clips import Clip, Frames, Reject
from afd_scale.data.teachers.prompts import LONGEST_TEXT, PromptRow, checked_rows, consistent
from afd_scale.data.teachers.tables import Row, Table, json_problem
from afd_scale.data.teachers.tar import Member, read_members
from afd_scale.data.teachers.walk import VIDEO_SUFFIXES
from afd_scale.data.video import file_fingerprint, read_video
from afd_scale.files import system_errors

_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # a key ends at the first dot of the member's name
_TAR = re.compile(r".*\.(tar|tgz|tar\.(gz|bz2|xz|zst|zstd|lz4))")  # those that are compressed are refused by name
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_TARS = 100_000
_TEXT_BYTES = 4 * LONGEST_TEXT


class WebDatasetTeacher:
    """Videos in uncompressed tars, each with its prompt in a txt or json member of the same key."""

    clips_at_once = 64

    def __init__(self, source: Path, name: str | None = None, columns: Mapping[str, str] | None = None):
        """Args:
            source: a tar, a folder of them, or their names with a range, such as `tars/{000..012}.tar`.
            name: of the teacher; None takes the source's.
            columns: see `read_prompts`; names of the fields in the json members.
        Raises:
            ConfigError: there are no tars.
        """  # fmt: skip
        if columns and "video" in columns:
            raise ConfigError(f"columns (video={columns['video']}) must not name video with teacher webdataset: "
                              "it is the member of the same key")  # fmt: skip
        self.source, self.columns, self.tars = source, columns, _tars_of(source)
        self.name = name or f"webdataset:{source.absolute().name}"
        self.provenance: dict[str, Any] = {"name": "webdataset", "source": source.absolute().name}

    def clips(self) -> list[Clip | Reject]:
        rows, _ = self._listing
        videos_of: Counter[str] = Counter()
        return [row if isinstance(row, Reject) else self._clip(row, videos_of) for row in rows]

    def _clip(self, row: PromptRow, videos_of: Counter[str]) -> Clip:
        """The next video of a prompt; how many it has is counted."""
        assert row.video is not None
        videos_of[row.prompt_id] += 1
        return Clip(row.video, row.prompt, row.prompt_id, videos_of[row.prompt_id] - 1, row.split)

    def fingerprint(self, clip: Clip) -> str:
        member = self._listing[1].get(clip.video)
        return "absent" if member is None else f"{file_fingerprint(member.tar)}-{member.begin}-{member.size}"

    def frames(self, clip: Clip, form: VideoForm) -> Frames:
        """The member is copied into a temporary file for as long as it is read."""
        member = self._listing[1].get(clip.video)
        if member is None:
            raise RejectedError("must be in its tar: it is there no more")
        suffix = Path(member.name).suffix.lower()
        assert suffix in VIDEO_SUFFIXES, "nothing else of a member's name gets into a path"
        rule = f"TMPDIR ({tempfile.gettempdir()}) must have room for the videos that are being read"
        with system_errors(rule), tempfile.NamedTemporaryFile(suffix=suffix) as copy:
            for part in member.content():
                copy.write(part)
            copy.flush()
            return read_video(Path(copy.name), form)

    @cached_property
    def _listing(self) -> tuple[list[PromptRow | Reject], dict[str, Member]]:
        """All rows, and the member of each video; every process that shares a job makes its own."""
        rejects: list[PromptRow | Reject] = []
        rows: list[tuple[str, Row]] = []
        members: dict[str, Member] = {}
        for name, tar in self.tars.items():
            found, refused = read_members(tar)
            rejects += [Reject(_shown(f"{name}/{member}" if member else name), "", why) for member, why in refused]
            samples, unknown = _samples(found)
            rejects += [Reject(_shown(f"{name}/{member.name}"), "", why) for member, why in unknown]
            for sample in samples:
                video = os.path.normpath(_shown(f"{name}/{sample['video'].name}"))
                members.setdefault(video, sample["video"])
                rows.append((video, _row(sample, video, "prompt" in (self.columns or {}))))
        if not rows and not rejects:
            raise ConfigError(f"source ({self.source}) must hold videos ({', '.join(VIDEO_SUFFIXES)}): there is none")
        objects = [row for _, row in rows if isinstance(row, dict)]
        names = tuple(dict.fromkeys(name for row in objects for name in row)) if objects else None
        checked = checked_rows(Table(names, lambda wanted: rows), f"source ({self.source})", ("prompt",), self.columns)
        return [*rejects, *consistent(checked)], members


def _samples(members: list[Member]) -> tuple[list[dict[str, Member]], list[tuple[Member, str]]]:
    """Members by kind (video, txt, json), a dict for each key that has a video; and those that are of no use."""
    samples: dict[str, dict[str, Member]] = {}
    unknown: list[tuple[Member, str]] = []
    for member in members:
        match = _KEY.fullmatch(member.name.removeprefix("./"))
        if match is None:
            continue  # no key: WebDataset passes over these, too
        key, kind = match[1], match[2].lower()
        kind = "video" if f".{kind}" in VIDEO_SUFFIXES else kind
        if kind not in ("video", "txt", "json"):
            if kind.endswith(VIDEO_SUFFIXES):
                unknown.append((member, f"must have no other dot in its name: the key would end there, {key!r}"))
        elif kind in (sample := samples.setdefault(key, {})):
            unknown.append((member, f"must be the only {kind} of its key: {sample[kind].name!r} is earlier"))
        else:
            sample[kind] = member
    alone = [sample for sample in samples.values() if "video" not in sample]
    unknown += [(member, "must have a video of its key beside it: there is none")
                for sample in alone for member in sample.values()]  # fmt: skip
    return [sample for sample in samples.values() if "video" in sample], unknown


def _row(sample: Mapping[str, Member], video: str, named: bool) -> Row:
    """The fields of a sample: those of its json, and the txt as its prompt unless that is `named` among the json's."""
    row: dict[str, Any] = {}
    try:
        if "json" in sample:
            found = json.loads(_text(sample["json"]))
            if not isinstance(found, dict):
                return "its json must hold an object"
            row |= found
        if "txt" in sample and not named:
            row["prompt"] = _text(sample["txt"])
    except RejectedError as error:
        return str(error)
    except (ValueError, RecursionError) as error:
        return f"its json must be JSON: {json_problem(error)}"
    if not sample.keys() & {"json", "txt"}:
        return "prompt must lie beside it, in a txt or json of its key"
    return row | {"video": video}


def _text(member: Member) -> str:
    if member.size > _TEXT_BYTES:
        raise RejectedError(f"{member.name!r} must have at most {_TEXT_BYTES} bytes: it has {member.size}")
    try:
        return b"".join(member.content()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RejectedError(f"{member.name!r} must be UTF-8: byte {error.start} is not") from error


def _tars_of(source: Path) -> dict[str, Path]:
    """Tars by the name that their clips have in the dataset."""
    if source.is_dir():
        tars = {path.name: path for path in sorted(source.iterdir()) if _TAR.fullmatch(path.name.lower())}
        if not tars:
            raise ConfigError(f"source ({source}) must be a tar or hold some: there is none directly in this folder")
        return tars
    if source.exists() or not _RANGE.search(str(source)):
        if not source.is_file():
            raise ConfigError(f"source ({source}) must be a tar, a folder of them or names such as a/{{000..012}}.tar: "
                              "there is none")  # fmt: skip
        return {source.name: source}
    beside = os.path.dirname(str(source).partition("{")[0])
    tars = {os.path.relpath(name, beside): Path(name) for name in _expanded(str(source))}
    absent = [str(path) for path in tars.values() if not path.is_file()]
    if absent:
        raise ConfigError(f"source ({source}) must name tars that are there: {len(absent)} are not, the first is "
                          f"{absent[0]}")  # fmt: skip
    return tars


def _expanded(names: str) -> Iterator[str]:
    """Every name of a pattern, `{0..2}` as shells expand it."""
    match = _RANGE.search(names)
    if match is None:
        yield names
        return
    first, last = match[1], match[2]
    if int(last) - int(first) >= _MOST_TARS:
        raise ConfigError(f"source ({names}) must name at most {_MOST_TARS} tars")
    width = max(len(first), len(last)) if first.startswith("0") else 0
    for number in range(int(first), int(last) + 1):
        yield from _expanded(f"{names[: match.start()]}{number:0{width}d}{names[match.end() :]}")


def _shown(name: str) -> str:
    """A name in one line of UTF-8."""
    return name if name.isprintable() else ascii(name)[1:-1]
