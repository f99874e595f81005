"""Interlaced videos are made whole: a bar moves by two columns from field to field."""

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from afd_scale.codecs.codec import RejectedError, VideoForm
from afd_scale.data.headers import read_header
from afd_scale.data.video import read_video
from tests.videos import add_box, box, write_video

FORM = VideoForm(frames=6, fps=25.0, height=64, width=64, colour="gray")
X264 = {"flags": "+ildct+ilme"}


def woven(top_first: bool = True, frames: int = 8) -> np.ndarray:
    """(T, H, W): the later field of each frame shows the bar two columns further."""
    video = np.full((frames, 64, 64), 30, np.uint8)
    for number, image in enumerate(video):
        for later in (0, 1):
            left = 4 * number + 2 * later + 8
            image[later ^ (not top_first) :: 2, left : left + 8] = 200
    return video


def combs(video: np.ndarray) -> float:
    """How far neighbouring rows of (T, H, W, 1) differ, at the worst of the frames."""
    return float(np.abs(np.diff(video[..., 0].astype(int), axis=1)).mean((1, 2)).max())


def bar(image: np.ndarray) -> float:
    """The column at which (H, W, 1) is brightest in the mean."""
    columns = image[..., 0].astype(float).mean(0)
    weights = columns - columns.min()
    return float((weights * np.arange(64)).sum() / weights.sum()) - 3.5


def flagged(video: np.ndarray, top_first: bool) -> list[av.VideoFrame]:
    """Frames that say of themselves which field is first."""
    graph = av.filter.Graph()
    source = graph.add("buffer", "video_size=64x64:pix_fmt=gray:time_base=1/25")
    field = graph.add("setfield", "tff" if top_first else "bff")
    graph.link_nodes(source, field, graph.add("buffersink")).configure()
    frames = []
    for image in video:
        graph.vpush(av.VideoFrame.from_ndarray(image, "gray"))
        frames.append(graph.vpull())
    return frames


def marked_in_frames(path: Path, top_first: bool, **settings: Any) -> Path:
    return write_video(path, flagged(woven(top_first), top_first), 25, codec_options=X264, **settings)


def marked_in_the_container(path: Path, top_first: bool) -> Path:
    order = 2 if top_first else 3
    return write_video(
        path,
        woven(top_first),
        25,
        codec="ffv1",
        setup=lambda stream: setattr(stream.codec_context, "field_order", order),
    )


@pytest.mark.parametrize("top_first", [True, False])
@pytest.mark.parametrize(
    ("write", "name"),
    [(marked_in_frames, "a.mp4"), (marked_in_frames, "a.ts"), (marked_in_the_container, "a.mkv")],
)
def test_fields_are_made_whole_frames(tmp_path: Path, write: Any, name: str, top_first: bool) -> None:
    video = read_video(write(tmp_path / name, top_first), FORM)
    assert combs(np.array(woven())[..., None]) > 5
    assert combs(video) < 0.5
    assert [round(bar(image)) for image in video] == [8 + 4 * number for number in range(6)], "of the earlier field"


def test_fields_that_a_box_tells_of(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mov", woven(False), 25)
    assert combs(read_video(path, FORM)) > 5, "without it nothing says so"
    add_box(path, box("fiel", b"\2\6"), "moov", "trak", "mdia", "minf", "stbl", "stsd", "avc1")
    assert read_header(path, "mov,mp4", 1, 0).fields == "bff"
    assert combs(read_video(path, FORM)) < 0.5


def test_the_first_frame_sees_motion_too(tmp_path: Path) -> None:
    video = woven(frames=2)
    video[1] = 30  # what moves is gone from the second
    path = write_video(tmp_path / "a.mp4", flagged(video, True), 25, codec_options=X264)
    assert combs(read_video(path, VideoForm(1, 25.0, 64, 64, colour="gray"))) < 0.5


def test_orientation_and_times_of_interlaced_frames(tmp_path: Path) -> None:
    path = marked_in_frames(tmp_path / "a.mp4", True, rotation=180, times=[0, 1, 2, 6, 7, 8, 9, 10])
    video = read_video(path, FORM)
    assert [round(56 - bar(image)) for image in video] == [8, 12, 16, 16, 16, 16]


def test_a_single_interlaced_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", flagged(woven(frames=1), True), 25, codec_options=X264)
    assert read_video(path, VideoForm(1, 25.0, 64, 64, colour="gray")).shape == (1, 64, 64, 1)


def test_whole_frames_behind_interlaced_ones(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64), dtype=np.uint8)
    parts = [marked_in_frames(tmp_path / "a.h264", True), write_video(tmp_path / "b.h264", noise, 25, pix_fmt="gray")]
    (tmp_path / "c.h264").write_bytes(b"".join(part.read_bytes() for part in parts))
    video = read_video(tmp_path / "c.h264", VideoForm(12, 25.0, 64, 64, colour="gray"))
    assert combs(video[:8]) < 0.5
    np.testing.assert_array_equal(video[8:, ..., 0], noise)


def test_whole_frames_where_fields_are_allowed_for(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64), dtype=np.uint8)
    path = write_video(
        tmp_path / "a.mp4", noise, 25, pix_fmt="gray", codec_options={"x264-params": "fake-interlaced=1"}
    )
    np.testing.assert_array_equal(read_video(path, FORM)[..., 0], noise[:6])


def test_fields_that_are_frames(tmp_path: Path) -> None:
    settings = {"codec": "libx265", "codec_options": {"x265-params": "interlace=tff:log-level=none"}}
    path = write_video(tmp_path / "a.mp4", woven(), 25, **settings)
    with pytest.raises(RejectedError, match=r"fields \(of hevc\) must be woven into frames"):
        read_video(path, FORM)
