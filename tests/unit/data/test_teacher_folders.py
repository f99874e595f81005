"""Folders of videos with links: every video once, and a word about each folder that was left out."""

import os
import stat
from pathlib import Path

import pytest

from afd_scale.config import ConfigError
from afd_scale.data.clips import Reject
from afd_scale.data.teachers.folder import FolderTeacher
from afd_scale.data.teachers.prompts import read_sidecars
from afd_scale.data.teachers.walk import videos_below
from afd_scale.evaluation.clip_sets import titled_clips


def place(folder: Path, *names: str) -> None:
    """Empty videos with a prompt each."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
        (folder / name).with_suffix(".txt").write_text(f"prompt of {name}")


def told(folder: Path) -> tuple[list[str], dict[str, str]]:
    rows = FolderTeacher(folder, None).clips()
    return ([row.video for row in rows if not isinstance(row, Reject)],
            {row.video: row.reason for row in rows if isinstance(row, Reject)})  # fmt: skip


def test_videos_of_linked_folders_are_the_teachers_too(tmp_path: Path) -> None:
    place(tmp_path / "disk", "b.mp4", "deep/c.webm")
    place(tmp_path / "other", "d.mp4")
    (tmp_path / "disk" / "further").symlink_to(tmp_path / "other")  # a link within what is linked
    place(tmp_path / "source", "a.mp4", "z/a.mp4")
    (tmp_path / "source" / "linked").symlink_to("../disk")
    videos = ["a.mp4", "linked/b.mp4", "linked/deep/c.webm", "linked/further/d.mp4", "z/a.mp4"]
    assert told(tmp_path / "source") == (videos, {})
    (tmp_path / "entry").symlink_to("source")
    assert told(tmp_path / "entry") == (videos, {})


def test_what_macos_writes_beside_videos_is_none_of_the_teachers(tmp_path: Path) -> None:
    place(tmp_path, "a.mp4")
    (tmp_path / "._a.mp4").write_bytes(b"\0\5\x16\7")
    assert told(tmp_path) == (["a.mp4"], {})


def test_cycles_of_folders_end_and_are_named_by_the_teacher(tmp_path: Path) -> None:
    place(tmp_path / "source", "a.mp4", "deep/b.mp4")
    place(tmp_path / "x", "c.mp4")
    source = tmp_path / "source"
    (source / "deep" / "up").symlink_to("..")
    (source / "self").symlink_to(".")
    (source / "x").symlink_to(tmp_path / "x")
    (source / "y").symlink_to(tmp_path / "x")
    (tmp_path / "x" / "back").symlink_to(source)
    videos, rejects = told(source)
    assert videos == ["a.mp4", "deep/b.mp4", "x/c.mp4"]
    rule = "must be a folder that is not read already: it leads to"
    assert rejects == {"self": f"{rule} .", "deep/up": f"{rule} .", "x/back": f"{rule} .", "y": f"{rule} x"}


def test_a_linked_folder_never_takes_the_place_of_the_teachers_own(tmp_path: Path) -> None:
    place(tmp_path, "z/a.mp4")
    (tmp_path / "a").symlink_to("z")
    videos, rejects = told(tmp_path)
    assert videos == ["z/a.mp4"]
    assert rejects == {"a": "must be a folder that is not read already: it leads to z"}


def test_links_that_lead_nowhere_are_named_by_the_teacher(tmp_path: Path) -> None:
    place(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "b.txt").unlink()
    (tmp_path / "b.txt").symlink_to("nowhere.txt")
    (tmp_path / "gone").symlink_to("/no/such/folder")
    (tmp_path / "round").symlink_to("round")
    (tmp_path / os.fsdecode(b"\xff")).symlink_to("nowhere")
    videos, rejects = told(tmp_path)
    assert videos == ["a.mp4"]
    assert rejects == {
        "b.mp4": "prompt must lie beside it, in a readable b.txt",
        "gone": "must be a readable folder: No such file or directory",
        "round": "must be a readable folder: Too many levels of symbolic links",
        r"\udcff": "must be a readable folder: No such file or directory",
    }


def test_a_folder_that_cannot_be_read_is_named_by_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, whom no mode keeps out."""
    place(tmp_path, "a.mp4", "shut/b.mp4")
    scan = os.scandir

    def scandir(path):  # type: ignore[no-untyped-def]
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert told(tmp_path) == (["a.mp4"], {"shut": "must be a readable folder: Permission denied"})
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(ConfigError, match="there is none; shut must be a readable folder: Permission denied"):
        read_sidecars(tmp_path)


def test_a_pipe_beside_a_video_does_not_hold_the_teacher_up(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    os.mkfifo(tmp_path / "a.txt")
    assert stat.S_ISFIFO((tmp_path / "a.txt").stat().st_mode)
    assert told(tmp_path)[1] == {"a.mp4": "prompt must lie beside it, in a readable a.txt"}


def test_a_teachers_folder_that_holds_tars_says_who_reads_them(tmp_path: Path) -> None:
    (tmp_path / "0.tar").touch()
    with pytest.raises(ConfigError, match=r"there is none; \.tar files are read with --teacher webdataset"):
        read_sidecars(tmp_path)


def test_measured_videos_of_linked_folders(tmp_path: Path) -> None:
    """What evaluation measures is found in the same way."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.mp4").touch()
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "linked").symlink_to("../disk")
    (tmp_path / "videos" / "up").symlink_to(".")
    named = {row.video for row in titled_clips(tmp_path / "videos")}
    assert named == {"up", "linked/a.mp4"}
    assert videos_below(tmp_path / "videos")[0] == [tmp_path / "videos" / "linked" / "a.mp4"]
