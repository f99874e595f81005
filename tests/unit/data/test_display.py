"""What files say of how they are shown, a test each: applied, or refused by its name."""

import struct
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.reformatter import ColorPrimaries, ColorTrc

from afd_scale.codecs.codec import RejectedError, VideoForm
from afd_scale.data.video import check_video, own_form, read_video
from tests.videos import add_box, box, remuxed, write_video

FORM = VideoForm(frames=2, fps=8.0, height=32, width=32, aspect="stretch", colour="gray")
SAMPLE_ENTRY = ("moov", "trak", "mdia", "minf", "stbl", "stsd", "avc1")


def corners(image: np.ndarray) -> list[int]:
    """Of (H, W) in tens, from the upper left by rows."""
    height, width = image.shape
    return [round(float(image[y, x]) / 10) for y in (2, height - 3) for x in (2, width - 3)]


def four_corners(height: int = 32, width: int = 48) -> np.ndarray:
    """(3, H, W): 40 and 80 above 120 and 160."""
    small = np.array([[40, 80], [120, 160]], np.uint8)
    return np.broadcast_to(small.repeat(height // 2, 0).repeat(width // 2, 1), (3, height, width))


def read(path: Path) -> list[int]:
    return corners(read_video(path, FORM)[0, ..., 0])


def grey(value: int, size: int = 32) -> np.ndarray:
    return np.full((3, size, size), value, np.uint8)


def refused(path: Path, match: str) -> None:
    """By both who read it; the bytes themselves are a video all the same."""
    check_video(path)
    for reading in (lambda: read_video(path, FORM), lambda: own_form(path)):
        with pytest.raises(RejectedError, match=match) as caught:
            reading()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("turn", "mirrors", "expected"),
    [
        (0, (True, False), [8, 4, 16, 12]),
        (0, (False, True), [12, 16, 4, 8]),
        (180, (False, False), [16, 12, 8, 4]),
        (90, (False, False), [8, 16, 4, 12]),
        (270, (False, False), [12, 4, 16, 8]),
        (90, (True, False), [16, 8, 12, 4]),
        (270, (True, False), [4, 12, 8, 16]),
    ],
)
def test_orientation_is_of_the_whole_matrix(
    tmp_path: Path, suffix: str, turn: int, mirrors: tuple[bool, bool], expected: list[int]
) -> None:
    if suffix == "mkv" and turn % 180 and any(mirrors):
        pytest.skip("Matroska cannot say it")
    path = tmp_path / f"a.{suffix}"
    write_video(path, four_corners(), setup=lambda stream: stream.set_display_rotation(turn, *mirrors))
    assert read(path) == expected
    assert (own_form(path).height, own_form(path).width) == ((48, 32) if turn % 180 else (32, 48))


@pytest.mark.parametrize("matrix", [(56756, 32768, -32768, 56756), (65536, 16384, 0, 65536), (0, 0, 0, 65536)])
def test_orientation_that_is_no_quarter_turn(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    a, b, c, d = matrix
    whole = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path = write_video(tmp_path / "a.mp4", grey(9), setup=lambda stream: stream.set_display_matrix(whole))
    refused(path, r"orientation \(.*\) must be of quarter turns and mirrors")


@pytest.mark.parametrize("last", [0, 1 << 30])
def test_orientation_that_was_left_at_zeros(tmp_path: Path, last: int) -> None:
    matrix = (0,) * 8 + (last,)
    path = write_video(tmp_path / "a.mp4", four_corners(), setup=lambda stream: stream.set_display_matrix(matrix))
    assert read(path) == [4, 8, 12, 16]


@pytest.mark.parametrize(("orientation", "expected"), [(1, [4, 8, 12, 16]), (6, [12, 4, 16, 8])])
def test_orientation_of_exif_beside_each_frame(tmp_path: Path, orientation: int, expected: list[int]) -> None:
    entry = struct.pack("<HHIHH", 0x112, 3, 1, orientation, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    source = write_video(tmp_path / "a.mov", four_corners(), codec="mjpeg", pix_fmt="yuvj420p")
    path = remuxed(source, tmp_path / "b.mov", lambda jpeg: jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2)
                   + exif + jpeg[2:])  # fmt: skip
    assert read(path) == expected


def test_pixel_shape_of_the_container_before_that_of_the_codec(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", grey(9), sample_aspect_ratio=Fraction(2, 1), rotation=90)
    assert (own_form(path).height, own_form(path).width) == (64, 32)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"pasp" + struct.pack(">II", 2, 1), b"pasp" + struct.pack(">II", 3, 1)))
    assert (own_form(path).height, own_form(path).width) == (96, 32)


def clean_aperture(width: int, height: int, right: int = 0, down: int = 0) -> bytes:
    return box("clap", struct.pack(">IIIIiIiI", width, 1, height, 1, right, 2, down, 2))


def framed(path: Path) -> Path:
    """In a frame of white: 8 columns at the left, 4 at the right, and 2 rows above."""
    video = np.full((3, 48, 64), 255, np.uint8)
    video[:, 2:, 8:60] = 90
    return write_video(path, video)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_clean_aperture(tmp_path: Path, suffix: str) -> None:
    path = add_box(framed(tmp_path / "a.mp4"), clean_aperture(52, 46, 4, 2), *SAMPLE_ENTRY)
    path = path if suffix == "mp4" else remuxed(path, tmp_path / "a.mkv")
    assert np.abs(read_video(path, FORM).astype(int) - 90).max() <= 2
    assert (own_form(path).height, own_form(path).width) == (46, 52)


def test_clean_aperture_of_the_size_of_the_track(tmp_path: Path) -> None:
    path = add_box(framed(tmp_path / "a.mp4"), clean_aperture(52, 46, 4, 2), *SAMPLE_ENTRY)
    size, clean = struct.pack(">II", 64 << 16, 48 << 16), struct.pack(">II", 52 << 16, 46 << 16)
    assert path.read_bytes().count(size) == 1
    path.write_bytes(path.read_bytes().replace(size, clean))
    assert (own_form(path).height, own_form(path).width) == (46, 52), "its pixels are square"


@pytest.mark.parametrize("added", [clean_aperture(52, 46, 40), box("clap", bytes(32)), box("clap", b"cut")])
def test_clean_aperture_that_cannot_be(tmp_path: Path, added: bytes) -> None:
    path = add_box(framed(tmp_path / "a.mp4"), added, *SAMPLE_ENTRY)
    with pytest.raises(RejectedError, match=r"clean aperture .*must"):
        read_video(path, FORM)


def half_transparent(pixel_format: str) -> list[av.VideoFrame]:
    """Grey 60; at the right, white of which a fifth is seen."""
    rgba = np.full((32, 32, 4), 255, np.uint8)
    rgba[:, :16, :3] = 60
    rgba[:, 16:, 3] = 51
    return [av.VideoFrame.from_ndarray(rgba, "rgba").reformat(format=pixel_format) for _ in range(3)]


@pytest.mark.parametrize("colour", ["gray", "rgb24"])
@pytest.mark.parametrize(
    ("name", "codec", "pixel_format"),
    [
        ("a.apng", "apng", "rgba"),
        ("a.mov", "png", "ya8"),
        ("a.mkv", "ffv1", "yuva444p"),
        ("b.mkv", "ffv1", "gbrap10le"),
    ],
)
def test_alpha_is_put_over_black(tmp_path: Path, name: str, codec: str, pixel_format: str, colour: Any) -> None:
    path = write_video(tmp_path / name, half_transparent(pixel_format), codec=codec, pix_fmt=pixel_format)
    video = read_video(path, replace(FORM, colour=colour))[0].astype(int)
    assert np.abs(video[:, :14] - 60).max() <= 2
    assert np.abs(video[:, 18:] - 51).max() <= 2


def test_transparent_parts_of_a_gif(tmp_path: Path) -> None:
    from PIL import Image

    images = []
    for number in range(3):
        rgba = np.full((32, 32, 4), (0, 200, 0, 255), np.uint8)
        rgba[:, 16:, 3] = 0
        rgba[number] = (200, 0, 0, 255)  # so that no two are the same
        images.append(Image.fromarray(rgba))
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=120, disposal=2)
    video = read_video(tmp_path / "a.gif", replace(FORM, colour="rgb24"))[0]
    assert video[16, 8].tolist() == [0, 200, 0]
    assert not video[8:, 16:].any()


@pytest.mark.parametrize(("codec", "options"), [("libvpx", {"auto-alt-ref": "0"}), ("libvpx-vp9", {})])
def test_alpha_that_the_decoder_drops(tmp_path: Path, codec: str, options: dict[str, str]) -> None:
    path = write_video(
        tmp_path / "a.webm", half_transparent("yuva420p"), codec=codec, pix_fmt="yuva420p", codec_options=options
    )
    refused(path, r"alpha \(of vp[89] in WebM\) must be decoded")


def test_alpha_that_is_announced_and_not_there(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"codec": "libvpx-vp9", "pix_fmt": "yuva420p"}
    path = write_video(tmp_path / "a.webm", half_transparent("yuva420p"), **settings)
    bare = remuxed(path, tmp_path / "b.webm", bytes, setup=lambda stream: setattr(stream, "pix_fmt", "yuva420p"))
    with av.open(str(bare)) as container:
        assert container.streams.video[0].metadata["alpha_mode"] == "1"
    assert read(bare) == [6, 26] * 2


@pytest.mark.parametrize("transfer", [ColorTrc.LINEAR, ColorTrc.LOG, ColorTrc.SMPTE428])
def test_transfer_that_is_of_no_display(tmp_path: Path, transfer: ColorTrc) -> None:
    path = write_video(tmp_path / "a.mp4", grey(9), color_trc=transfer.value)
    refused(path, rf"colours \({transfer.name}\) must be a display's")


@pytest.mark.parametrize("kind", ["dvcC", "dvvC"])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_dolby_vision(tmp_path: Path, kind: str, suffix: str) -> None:
    profile = {"dvcC": 5, "dvvC": 8}[kind]
    configuration = bytes([1, 0, profile << 1, 1 << 3 | 0b101, (profile == 8) << 4]).ljust(24, b"\0")
    path = add_box(write_video(tmp_path / "a.mp4", grey(9)), box(kind, configuration), *SAMPLE_ENTRY)
    refused(path if suffix == "mp4" else remuxed(path, tmp_path / "a.mkv"), r"colours \(Dolby Vision\) must be SDR")


@pytest.mark.parametrize(
    ("primaries", "expected"), [(ColorPrimaries.BT2020, (216, 66, 48)), (ColorPrimaries.SMPTE432, (193, 83, 49))]
)
def test_wide_primaries_are_brought_to_bt709(tmp_path: Path, primaries: ColorPrimaries, expected: Any) -> None:
    # The expected values are swscale's, which converts RGB alone.
    colour = np.broadcast_to(np.array([180, 90, 60], np.uint8), (3, 32, 32, 3))
    for said, seen in ((primaries, expected), (ColorPrimaries.SMPTE170M, (180, 90, 60))):
        path = write_video(tmp_path / "a.mp4", colour, pix_fmt="yuv444p", color_primaries=said.value)
        assert np.abs(read_video(path, replace(FORM, colour="rgb24"))[0, 0, 0] - np.array(seen)).max() <= 3


@pytest.mark.parametrize("primaries", [ColorPrimaries.SMPTE431, ColorPrimaries.FILM])
def test_primaries_that_are_not_converted(tmp_path: Path, primaries: ColorPrimaries) -> None:
    path = write_video(tmp_path / "a.mp4", grey(9), color_primaries=primaries.value)
    refused(path, rf"colour primaries \({primaries.name}\) must be")


@pytest.mark.parametrize(("matrix", "name"), [(8, "YCgCo"), (10, "BT2020_CL"), (14, "ICtCp")])
def test_colour_matrix_that_is_not_converted(tmp_path: Path, matrix: int, name: str) -> None:
    refused(write_video(tmp_path / "a.mp4", grey(9), colorspace=matrix), rf"colour matrix \({name}\) must be of")


def test_a_matrix_of_rgb_where_colours_are_coarser_is_none(tmp_path: Path) -> None:
    colour = np.broadcast_to(np.array([180, 90, 60], np.uint8), (3, 32, 32, 3))
    path = write_video(tmp_path / "a.mp4", colour, colorspace=0)
    assert np.abs(read_video(path, replace(FORM, colour="rgb24"))[0, 0, 0].astype(int) - (180, 90, 60)).max() <= 3
    whole = write_video(tmp_path / "a.mkv", colour, codec="ffv1", pix_fmt="yuv444p", colorspace=0)
    refused(whole, r"colour matrix \(RGB\) must be of")


@pytest.mark.parametrize(("matrix", "expected"), [(1, (0, 255)), (5, (0, 255)), (7, (0, 255)), (9, (0, 255))])
def test_colour_matrices(tmp_path: Path, matrix: int, expected: tuple[int, int]) -> None:
    """A blue of full strength is one by each matrix: luma, and two differences of colour."""
    luma_of_blue = {1: 0.0722, 5: 0.114, 7: 0.087, 9: 0.0593}[matrix]
    red_of_blue = -luma_of_blue / {1: 1.5748, 5: 1.402, 7: 1.576, 9: 1.4746}[matrix]
    frame = av.VideoFrame(32, 32, "yuv444p")
    for plane, value in zip(frame.planes, (16 + 219 * luma_of_blue, 128 + 112, 128 + 224 * red_of_blue), strict=True):
        plane.update(bytes([round(value)]) * plane.buffer_size)
    path = write_video(tmp_path / "a.mp4", [frame] * 3, pix_fmt="yuv444p", colorspace=matrix)
    red, green, blue = read_video(path, replace(FORM, colour="rgb24"))[0, 0, 0].tolist()
    assert max(red, green) <= expected[0] + 4
    assert blue >= expected[1] - 4


@pytest.mark.parametrize(("pixel_format", "range_", "expected"), [
    ("yuv420p", 0, 128), ("yuv420p", 1, 128), ("yuv420p", 2, 126),
    ("yuvj420p", 2, 126), ("gray", 1, 128), ("gray", 2, 126),
])  # fmt: skip
def test_range_of_colours(tmp_path: Path, pixel_format: str, range_: int, expected: int) -> None:
    frame = av.VideoFrame(32, 32, pixel_format)
    for plane, value in zip(frame.planes, (126, 128, 128), strict=False):
        plane.update(bytes([value]) * plane.buffer_size)
    frame.color_range = range_
    path = write_video(tmp_path / "a.mp4", [frame] * 3, pix_fmt=pixel_format, color_range=range_)
    assert np.abs(read_video(path, FORM).astype(int) - expected).max() <= 1


def stereo_in_mkv(folder: Path) -> Path:
    return write_video(folder / "a.mkv", grey(9), setup=lambda stream: stream.metadata.update(stereo_mode="bottom_top"))


def anaglyph_in_mkv(folder: Path) -> Path:
    return write_video(
        folder / "a.mkv", grey(9), setup=lambda stream: stream.metadata.update(stereo_mode="anaglyph_green_magenta")
    )


def stereo_in_mp4(folder: Path) -> Path:
    return add_box(write_video(folder / "a.mp4", grey(9)), box("st3d", b"\0\0\0\0\2"), *SAMPLE_ENTRY)


def stereo_in_the_stream(folder: Path) -> Path:
    return write_video(folder / "a.mp4", grey(9), codec_options={"x264-params": "frame-packing=4"})


@pytest.mark.parametrize("write", [stereo_in_mkv, anaglyph_in_mkv, stereo_in_mp4, stereo_in_the_stream])
def test_stereo(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    refused(write(tmp_path), r"picture \(.*\) must be for one eye")


def test_spherical(tmp_path: Path) -> None:
    projection = box("proj", box("prhd", bytes(16)) + box("equi", bytes(20)))
    sphere = box("sv3d", box("svhd", b"\0\0\0\0a\0") + projection)
    path = add_box(write_video(tmp_path / "a.mp4", grey(9)), sphere, *SAMPLE_ENTRY)
    refused(path, r"picture \(spherical\) must be flat")


def tracks(path: Path, films: list[tuple[int, int, int, int]]) -> Path:
    """Args:
        films: grey, frames, side and disposition of each.
    """  # fmt: skip
    with av.open(str(path), "w") as container:
        streams = []
        for _, _, side, disposition in films:
            stream = container.add_stream("libx264", rate=8, options={"qp": "0"})
            stream.width = stream.height = side
            stream.disposition = disposition  # type: ignore[assignment]
            streams.append(stream)
        for stream, (value, frames, side, _) in zip(streams, films, strict=True):
            for number in range(frames):
                frame = av.VideoFrame.from_ndarray(grey(value, side)[0], "gray")
                frame.pts, frame.time_base = number, Fraction(1, 8)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("suffix", "films"),
    [
        ("mkv", [(40, 4, 64, 0), (80, 4, 64, 0), (120, 4, 32, 1)]),  # the default
        ("mkv", [(40, 4, 32, 1), (120, 4, 64, 1), (80, 4, 64, 1)]),  # all are: the first of the largest
        ("mkv", [(40, 4, 32, 0), (120, 4, 64, 0)]),  # none is
        ("mkv", [(40, 1, 64, 1), (120, 4, 32, 0)]),  # after a poster
        ("mp4", [(40, 1, 64, 1), (120, 4, 32, 0)]),
        ("mp4", [(40, 4, 64, 0), (120, 4, 64, 1)]),
    ],
)
def test_the_track_that_is_the_film(tmp_path: Path, suffix: str, films: list[tuple[int, int, int, int]]) -> None:
    assert read(tracks(tmp_path / f"a.{suffix}", films)) == [12] * 4


def test_cropping_is_of_the_track_that_is_read(tmp_path: Path) -> None:
    path = tracks(tmp_path / "a.mkv", [(40, 4, 32, 0), (120, 4, 64, 1)])
    cut = add_box(write_video(tmp_path / "b.mp4", grey(9)), clean_aperture(10, 12), *SAMPLE_ENTRY)
    both = tmp_path / "c.mkv"
    with av.open(str(cut)) as first, av.open(str(path)) as second, av.open(str(both), "w") as out:
        sources = [first.streams.video[0], second.streams.video[1]]
        for source, copy in [(source, out.add_stream_from_template(source)) for source in sources]:
            copy.disposition = source is sources[1]  # type: ignore[assignment]
            for packet in source.container.demux(source):
                if packet.size:
                    packet.stream = copy
                    out.mux(packet)
    assert (own_form(both).height, own_form(both).width) == (64, 64)


def test_only_a_cover(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        sound, cover = container.add_stream("aac", rate=8000), container.add_stream("mjpeg", rate=8)
        cover.width = cover.height = 32
        cover.pix_fmt, cover.disposition = "yuvj420p", Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame(32, 32, "yuvj420p")))
        container.mux(cover.encode())
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.rate = 8000
        container.mux(sound.encode(samples))
        container.mux(sound.encode())
    with pytest.raises(RejectedError, match="must be a whole video: only a still picture, as of a cover"):
        read_video(tmp_path / "a.mp4", FORM)
