"""Folders of videos: files that are had, and rows that are rejected without ending the job."""

import json
from pathlib import Path

import numpy as np
import pytest

from afd_scale.codecs.codec import RejectedError, VideoForm
from afd_scale.data.clips import Clip, Reject
from afd_scale.data.teachers.folder import FolderTeacher
from afd_scale.data.video import read_video
from tests.videos import moving_bar, write_video

FORM = VideoForm(frames=2, fps=8.0, height=16, width=16)


def teacher(folder: Path, *videos: str) -> FolderTeacher:
    """Of one row a video, each with a prompt of its own."""
    folder.mkdir(exist_ok=True)
    rows = [{"video": video, "prompt": f"prompt {number}"} for number, video in enumerate(videos)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FolderTeacher(folder, folder / "prompts.jsonl")


def reason(teacher: FolderTeacher) -> str:
    """Why the only row is not used, when it is listed or when it is read."""
    (clip,) = teacher.clips()
    if isinstance(clip, Reject):
        return clip.reason
    with pytest.raises(RejectedError) as caught:
        teacher.frames(clip, FORM)
    return str(caught.value)


@pytest.mark.parametrize(
    ("video", "expected"),
    [
        ("a.mp4\0", "video ('a.mp4\\x00') must be a text"),
        ("x" * 300 + ".mp4", "must be a readable file: File name too long"),
        ("loop.mp4", "must be a readable file"),
        ("loop.mp4/a.mp4", "must be a readable file"),
        (".", "must be a readable file"),
        ("../a.mp4", "video must lie below the source"),
        ("deep/../../a.mp4", "video must lie below the source"),
        ("..", "video must lie below the source"),
        ("/a.mp4", "video must lie below the source"),
    ],
)
def test_videos_that_cannot_be_had(tmp_path: Path, video: str, expected: str) -> None:
    write_video(tmp_path / "a.mp4", moving_bar(2, 16, 16))
    source = tmp_path / "source"
    source.mkdir()
    (source / "loop.mp4").symlink_to("loop.mp4")
    assert reason(teacher(source, video)).startswith(expected)


def test_absolute_paths_may_lead_into_the_source_alone(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving_bar(2, 16, 16))
    inside = teacher(tmp_path, str(path))
    (clip,) = inside.clips()
    assert isinstance(clip, Clip)
    assert len(inside.frames(clip, FORM)) == 2
    assert reason(teacher(tmp_path / "deep", str(path))).startswith("video must lie below the source")


def test_links_to_files_elsewhere(tmp_path: Path) -> None:
    path = write_video(tmp_path / "store" / "1.mp4", moving_bar(2, 16, 16))
    (tmp_path / "source" / "..deep").mkdir(parents=True)
    (tmp_path / "source" / "..deep" / "a.mp4").symlink_to(path)
    linked = teacher(tmp_path / "source", "..deep/a.mp4")
    (clip,) = linked.clips()
    assert isinstance(clip, Clip)
    np.testing.assert_array_equal(linked.frames(clip, FORM), read_video(path, FORM))


def test_two_spellings_are_one_video(tmp_path: Path) -> None:
    first, second, other = teacher(tmp_path, "./a.mp4", "deep/..//a.mp4", "b.mp4").clips()
    assert isinstance(first, Clip)
    assert first.video == "a.mp4"
    assert second == Reject("a.mp4", "prompt 1", "video must occur once: an earlier row has it")
    assert isinstance(other, Clip)
