"""A folder of videos that some teacher has made, and their prompts."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afd_scale.codecs.codec import VideoForm
from afd_scale.config import ConfigError
from afd_scale.data.clips import Clip, Frames, Reject
from afd_scale.data.teachers.prompts import PromptRow, read_prompts, read_sidecars
from afd_scale.data.video import file_fingerprint, read_video


class FolderTeacher:
    """Video files below a folder, and a table of prompts or a txt beside each."""

    clips_at_once = 64

    def __init__(
        self, folder: Path, prompts: Path | None, name: str | None = None, columns: Mapping[str, str] | None = None
    ):
        """Args:
            folder: that the table's `video` is relative to.
            prompts, columns: see `read_prompts`; without a table a txt is read beside each video.
            name: of the teacher; None takes the folder's.
        Raises:
            ConfigError: it is no folder.
        """  # fmt: skip
        if not folder.is_dir():
            hint = "; a .tar is read with --teacher webdataset" if folder.suffix == ".tar" else ""
            raise ConfigError(f"source ({folder}) must be a folder of videos: there is none{hint}")
        self.folder, self.prompts, self.columns = folder, prompts, columns
        self.name = name or f"folder:{folder.resolve().name}"
        self.provenance: dict[str, Any] = {"name": "folder", "folder": folder.resolve().name}

    def clips(self) -> list[Clip | Reject]:
        if self.prompts is None:
            rows = read_sidecars(self.folder)
        else:
            rows = read_prompts(self.prompts, needs=("prompt", "video"), columns=self.columns)
        videos_of: Counter[str] = Counter()
        return [row if isinstance(row, Reject) else self._clip(row, videos_of) for row in rows]

    def _clip(self, row: PromptRow, videos_of: Counter[str]) -> Clip | Reject:
        """The next video of a prompt; how many it has is counted."""
        if row.video is None:
            return Reject(row.prompt_id, row.prompt, "video must be given: the row names none")
        source = Path(os.path.normpath(self.folder.absolute()))  # not resolved: links in the source may lead anywhere
        if not Path(os.path.normpath(source / row.video)).is_relative_to(source):
            return Reject(row.video, row.prompt, "video must lie below the source: it leads out of it")
        videos_of[row.prompt_id] += 1
        return Clip(row.video, row.prompt, row.prompt_id, videos_of[row.prompt_id] - 1, row.split)

    def fingerprint(self, clip: Clip) -> str:
        return file_fingerprint(self.folder / clip.video)

    def frames(self, clip: Clip, form: VideoForm) -> Frames:
        return read_video(self.folder / clip.video, form)
