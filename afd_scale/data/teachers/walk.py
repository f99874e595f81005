"""The videos below a folder, those of linked folders too."""

import os
from collections import deque
from pathlib import Path

from afd_scale.data.clips import Reject

VIDEO_SUFFIXES = (".mp4", ".webm", ".gif", ".mov", ".mkv", ".m4v", ".avi")
_BESIDE = "._"  # what macOS writes beside files on other file systems


def videos_below(folder: Path) -> tuple[list[Path], list[Reject]]:
    """All videos below a folder, sorted, and the folders and links that could not be followed, by name.

    Links to folders are followed when all that is not linked was seen, in their order. A folder is read once: a link to
    one that was seen, as where links make a cycle, is a Reject.
    """
    videos: list[Path] = []
    rejects: list[Reject] = []
    seen: dict[tuple[int, int], Path] = {}
    waiting, linked = deque([folder]), deque[Path]()
    while waiting or linked:
        place = waiting.popleft() if waiting else linked.popleft()
        try:
            state = place.stat()
            earlier = seen.setdefault((state.st_dev, state.st_ino), place)
            if earlier is not place:
                rejects.append(Reject(_shown(place, folder), "", "must be a folder that is not read already: it leads "
                                                                 f"to {_shown(earlier, folder)}"))  # fmt: skip
                continue
            with os.scandir(place) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            rejects.append(Reject(_shown(place, folder), "", f"must be a readable folder: {error.strerror}"))
            continue
        for entry in inside:
            path = Path(entry.path)
            if path.suffix.lower() in VIDEO_SUFFIXES and not entry.name.startswith(_BESIDE):
                videos.append(path)
            if entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            elif entry.is_symlink() and _may_be_a_folder(path):
                linked.append(path)
    return sorted(videos), rejects


def _may_be_a_folder(link: Path) -> bool:
    """One that leads nowhere may have been, unless its name is of a video or its prompt: those are told of as such."""
    return os.path.isdir(link) or (not os.path.exists(link) and link.suffix.lower() not in (*VIDEO_SUFFIXES, ".txt"))


def _shown(path: Path, folder: Path) -> str:
    """A path below the folder; names of files need not be UTF-8."""
    return path.relative_to(folder).as_posix().encode(errors="backslashreplace").decode()
