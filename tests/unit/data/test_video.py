"""Real video files, read into a form: which frames, which pixels, and what is refused."""

import math
import struct
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.video.reformatter import ColorTrc

from afd_scale.codecs.codec import RejectedError, VideoForm
from afd_scale.config import ConfigError
from afd_scale.data.display import Track
from afd_scale.data.headers import Header
from afd_scale.data.video import _spans, fit, own_form, read_video
from tests.videos import moving_bar, write_video

GRAY = VideoForm(frames=12, fps=8.0, height=16, width=16, colour="gray")
B_FRAMES = "bframes=3:b-adapt=0:scenecut=0"


def numbered(frames: int, height: int = 16, width: int = 16) -> np.ndarray:
    """(T, H, W): every frame is of a grey of its own."""
    return np.stack([np.full((height, width), 10 * number + 5, np.uint8) for number in range(frames)])


def numbers(frames: np.ndarray) -> list[int]:
    """Of the frames of `numbered`."""
    return [round((int(image.mean()) - 5) / 10) for image in frames]


def test_video_of_the_form_passes_unchanged(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (12, 16, 16), dtype=np.uint8)
    path = write_video(tmp_path / "a.mp4", grey, pix_fmt="gray")
    np.testing.assert_array_equal(read_video(path, GRAY)[..., 0], grey)


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (8, [0, 1, 2, 3, 4, 5]),
        (16, [0, 2, 4, 6, 8, 10]),
        (12, [0, 1, 3, 4, 6, 7]),  # 1.5 frames a step: the one that is shown
        (Fraction(24000, 1001), [0, 3, 6, 9, 12, 15]),  # each less than a millisecond late
        (4, [0, 0, 1, 1, 2, 2]),
    ],
)
def test_frames_are_those_shown_at_the_forms_times(tmp_path: Path, rate: Fraction | int, expected: list[int]) -> None:
    path = write_video(tmp_path / "a.mp4", numbered(20), rate, pix_fmt="gray")
    assert numbers(read_video(path, replace(GRAY, frames=6))) == expected


def test_variable_frame_rate_follows_the_times(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", numbered(5), 8, pix_fmt="gray", times=[0, 1, 4, 5, 6])
    assert numbers(read_video(path, replace(GRAY, frames=7))) == [0, 1, 1, 1, 2, 3, 4]


@pytest.mark.parametrize("rate", [8, 10, 12, 15, 16, 24, 30])
@pytest.mark.parametrize(("suffix", "codec", "pix_fmt"), [("webm", "libvpx-vp9", "yuv420p"), ("gif", "gif", "gray")])
def test_containers_that_round_times(tmp_path: Path, suffix: str, codec: str, pix_fmt: str, rate: int) -> None:
    path = write_video(tmp_path / f"a.{suffix}", numbered(14), rate, codec=codec, pix_fmt=pix_fmt)
    assert numbers(read_video(path, replace(GRAY, fps=float(rate)))) == list(range(12))


def test_avi_counts_frames_and_rounds_nothing(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", numbered(20), 12, codec="mpeg4")
    assert numbers(read_video(path, replace(GRAY, frames=6))) == [0, 1, 3, 4, 6, 7]


def test_name_that_looks_like_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "12:30.mp4", numbered(12), pix_fmt="gray")
    monkeypatch.chdir(tmp_path)
    assert numbers(read_video(Path("12:30.mp4"), GRAY)) == list(range(12))


def test_colours_are_rgb_of_the_videos_standard(tmp_path: Path) -> None:
    green = np.zeros((4, 720, 1280, 3), np.uint8)
    green[..., 1] = 200
    form = VideoForm(frames=2, fps=8.0, height=8, width=8)
    # The encoder converts by BT.601. Read as BT.709, which HD of unspecified standard is, green comes out otherwise.
    hd = read_video(write_video(tmp_path / "hd.mp4", green), form)[0, 4, 4].astype(int)
    sd = read_video(write_video(tmp_path / "sd.mp4", green[:, :480, :640]), form)[0, 4, 4].astype(int)
    assert np.abs(sd - [0, 200, 0]).max() <= 3
    assert np.abs(hd - [0, 200, 0]).max() > 10


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_the_form_of_a_video_itself(tmp_path: Path, name: str) -> None:
    path = write_video(tmp_path / name, numbered(20, 32, 48), 16)
    form = own_form(path)
    assert form == VideoForm(20, 16.0, 32, 48)
    assert len(read_video(path, form)) == 20


def test_the_form_of_a_video_itself_is_as_it_is_shown(tmp_path: Path) -> None:
    turned = own_form(write_video(tmp_path / "a.mp4", numbered(4, 32, 48), rotation=90))
    wide = own_form(write_video(tmp_path / "b.mp4", numbered(4, 32, 48), sample_aspect_ratio=Fraction(2, 1)))
    assert [(form.height, form.width) for form in (turned, wide)] == [(48, 32), (32, 96)]
    (tmp_path / "c.mp4").write_bytes(b"no video")
    with pytest.raises(RejectedError, match="readable video"):
        own_form(tmp_path / "c.mp4")


def test_rotation_of_the_metadata(tmp_path: Path) -> None:
    video = np.zeros((3, 16, 32), np.uint8)
    video[:, :, :8] = 255  # the left
    form = VideoForm(frames=1, fps=8.0, height=32, width=16, colour="gray")
    turned = read_video(write_video(tmp_path / "a.mp4", video, pix_fmt="gray", rotation=90), form)[0, ..., 0]
    assert turned[-4:].mean() > 250, "counterclockwise, the left comes to lie below"
    assert turned[:4].mean() < 5


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    bar = np.zeros((2, 16, 16), np.uint8)
    bar[:, :, 4:12] = 255  # with pixels twice as wide as high it is shown 32 wide, the middle half white
    path = write_video(tmp_path / "a.mp4", bar, pix_fmt="gray", sample_aspect_ratio=Fraction(2, 1))
    form = VideoForm(frames=1, fps=8.0, height=16, width=16, colour="gray")
    assert read_video(path, form)[0, ..., 0].mean() > 240, "cut to a square, the white middle is left"


@pytest.mark.parametrize(
    ("aspect", "white"), [("crop", (0.0, 0.0)), ("pad", (0.0, 0.0)), ("stretch", (0.25, 0.25))]
)  # fmt: skip
def test_aspect(aspect: str, white: tuple[float, float]) -> None:
    wide = np.full((16, 64, 1), 100, np.uint8)
    wide[:, :16] = wide[:, 48:] = 255  # a quarter at each side
    square = fit(wide, VideoForm(1, 1.0, 16, 16, aspect, "gray"))[..., 0]  # type: ignore[arg-type]
    assert square.shape == (16, 16)
    if aspect == "crop":
        assert (square == 100).all(), "the sides are cut off"
    elif aspect == "pad":
        assert not square[:6].any(), "a bar above"
        assert not square[10:].any(), "a bar below"
        assert (square[6:10, :3] > 240).all()
    else:
        assert (square[:, :3] > 240).all()
        assert (square[:, 6:10] == 100).all()


def test_shrinking_is_anti_aliased() -> None:
    stripes = np.zeros((64, 64, 1), np.uint8)
    stripes[:, ::2] = 255
    small = fit(stripes, VideoForm(1, 1.0, 16, 16, "crop", "gray"))
    assert np.abs(small[:, 2:-2].astype(int) - 127).max() < 6


def test_too_short(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", numbered(11), pix_fmt="gray")
    with pytest.raises(RejectedError, match=r"must last 1\.5 s \(12 frames at 8 a second\): it is too short, 1\.375 s"):
        read_video(path, GRAY)


def test_truncated(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "a.mp4", moving_bar(60, 64, 64), options={"movflags": "faststart"}).read_bytes()
    (tmp_path / "b.mp4").write_bytes(whole[: len(whole) * 9 // 10])
    with pytest.raises(RejectedError, match="must be whole: it is truncated"):
        read_video(tmp_path / "b.mp4", GRAY)


@pytest.mark.parametrize("content", [b"", b"<html>Not found</html>", bytes(10_000)])
def test_no_video(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(RejectedError, match="must be a readable video") as caught:
        read_video(tmp_path / "a.mp4", GRAY)
    assert "\n" not in str(caught.value)


def test_no_video_stream(tmp_path: Path) -> None:
    import wave

    with wave.open(str(tmp_path / "a.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(1600))
    with pytest.raises(RejectedError, match="must be a whole video: no video stream"):
        read_video(tmp_path / "a.wav", GRAY)


def test_damaged_packets(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.mp4", noise)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(2000)
    path.write_bytes(content)
    with pytest.raises(RejectedError):
        read_video(path, GRAY)


@pytest.mark.parametrize("rate", [Fraction(2402, 10), 1000, Fraction(1, 2), Fraction(1, 60)])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_no_rate_is_wrong(tmp_path: Path, name: str, rate: Fraction | int) -> None:
    path = write_video(tmp_path / name, numbered(20), rate, pix_fmt="gray")
    form = own_form(path)
    assert form.frames == 20
    assert form.fps == pytest.approx(float(rate), rel=1e-3)
    assert numbers(read_video(path, replace(GRAY, frames=20, fps=form.fps))) == list(range(20))


def test_timestamps_before_the_rate_of_the_metadata(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", numbered(6), 24, pix_fmt="gray", times=range(0, 18, 3))
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 24
    assert numbers(read_video(path, replace(GRAY, frames=5))) == [0, 1, 2, 3, 4]
    assert own_form(path).fps == pytest.approx(6 / (15 / 24 + 1 / 24), rel=2e-3)


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv"])
def test_the_last_frame_lasts_as_long_as_it_says(tmp_path: Path, name: str) -> None:
    path = write_video(tmp_path / name, numbered(3), pix_fmt="gray", durations=[1, 1, 5])
    assert numbers(read_video(path, replace(GRAY, frames=7))) == [0, 1, 2, 2, 2, 2, 2]
    assert own_form(path).fps == pytest.approx(3 * 8 / 7)
    with pytest.raises(RejectedError, match=r"it is too short, 0\.875 s"):
        read_video(path, replace(GRAY, frames=8))


def test_the_last_frame_lasts_as_long_as_the_one_before_where_it_says_nothing() -> None:
    track = Track(SimpleNamespace(average_rate=None, guessed_rate=None), Header(), None, math.inf)

    def ends(*items: tuple[int | None, int]) -> list[float]:
        frames = [SimpleNamespace(pts=pts, duration=duration, time_base=Fraction(1, 8)) for pts, duration in items]
        return [8 * span.end for span in _spans(frames, track)]

    assert ends((40, 1), (41, 1), (44, 0)) == [1, 4, 7]
    assert ends((None, 2), (None, 3), (None, 1)) == [2, 5, 6], "without times, one after another"
    assert ends((None, 2), (7, 3), (None, 1)) == [2, 5, 6]
    with pytest.raises(RejectedError, match="times must be there: frames have neither times nor durations"):
        ends((None, 0))
    track.stream.average_rate = Fraction(4)
    assert ends((None, 0), (None, 0)) == [2, 4], "by the rate"


def test_an_edit_list_may_cut_the_last_frame_short(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", numbered(3), pix_fmt="gray", durations=[1, 1, 5])
    content = path.read_bytes()
    whole, cut = (b"elst" + struct.pack(">III", 0, 1, milliseconds) for milliseconds in (875, 500))
    assert whole in content
    path.write_bytes(content.replace(whole, cut))
    assert numbers(read_video(path, replace(GRAY, frames=4))) == [0, 1, 2, 2]
    with pytest.raises(RejectedError, match=r"it is too short, 0\.500 s"):
        read_video(path, replace(GRAY, frames=5))


def test_an_edit_list_of_another_rate(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", numbered(12), pix_fmt="gray")
    content = path.read_bytes()
    at = content.index(b"elst") + 4
    path.write_bytes(content[: at + 16] + struct.pack(">i", 1 << 15) + content[at + 20 :])
    with pytest.raises(RejectedError, match=r"edit list \(rate 0\.5\) must play at rate 1"):
        read_video(path, GRAY)


def test_an_edit_of_nothing_has_no_rate(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", numbered(12), times=range(5, 17), pix_fmt="gray")
    content = path.read_bytes()
    at = content.index(b"elst") + 12
    assert content[at + 4 : at + 12] == b"\xff\xff\xff\xff\0\1\0\0", "the first edit is a delay"
    path.write_bytes(content[: at + 8] + bytes(4) + content[at + 12 :])
    assert numbers(read_video(path, GRAY)) == list(range(12))


@pytest.mark.parametrize("first", [5, 1000])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_a_video_begins_with_its_first_frame(tmp_path: Path, name: str, first: int) -> None:
    path = write_video(tmp_path / name, numbered(12), times=range(first, first + 12))
    assert numbers(read_video(path, GRAY)) == list(range(12))
    assert own_form(path) == VideoForm(12, 8.0, 16, 16)


def test_one_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", numbered(1), 90_000, pix_fmt="gray")
    assert own_form(path) == VideoForm(1, 90_000.0, 16, 16)
    assert numbers(read_video(path, replace(GRAY, frames=1))) == [0]
    with pytest.raises(RejectedError, match=r"it is too short, 0\.000 s"):
        read_video(path, replace(GRAY, frames=2))


@pytest.mark.parametrize(
    ("codec", "options"), [("mpeg4", {"bf": "2"}), ("libx264", {"qp": "10", "x264-params": B_FRAMES})]
)
def test_avi_whose_frames_are_stored_in_another_order(tmp_path: Path, codec: str, options: dict[str, str]) -> None:
    path = write_video(tmp_path / "a.avi", numbered(20), 12, codec=codec, codec_options=options)
    assert numbers(read_video(path, replace(GRAY, frames=6))) == [0, 1, 3, 4, 6, 7]
    assert own_form(path) == VideoForm(20, 12.0, 16, 16)


def test_avi_that_left_frames_out(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", numbered(6), codec="mpeg4", times=[0, 1, 2, 6, 7, 8])
    assert numbers(read_video(path, replace(GRAY, frames=8))) == [0, 1, 2, 2, 2, 2, 3, 4]


def test_times_that_do_not_increase(tmp_path: Path) -> None:
    times = [0, 1, 2, 2, *range(3, 19)]
    path = write_video(tmp_path / "a.mkv", numbered(20), codec="ffv1", pix_fmt="gray", times=times)
    with pytest.raises(RejectedError, match=r"must have increasing times: frame 3 is shown at 0\.250 s after 0\.250 s"):
        read_video(path, GRAY)


@pytest.mark.parametrize("transfer", [ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67])
def test_hdr(tmp_path: Path, transfer: ColorTrc) -> None:
    path = write_video(tmp_path / "a.mp4", numbered(12), pix_fmt="gray", color_trc=transfer.value)
    with pytest.raises(RejectedError, match=rf"colours \({transfer.name}\) must be SDR"):
        read_video(path, GRAY)


def test_pixels_far_from_square(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", numbered(12), pix_fmt="gray", sample_aspect_ratio=Fraction(11, 1))
    with pytest.raises(RejectedError, match=r"pixels \(11 times as wide as high\) must be nearly square"):
        read_video(path, GRAY)


def test_form_must_be_positive() -> None:
    with pytest.raises(ConfigError, match=r"fps \(0\) must be positive"):
        replace(GRAY, fps=0)
