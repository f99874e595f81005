"""Sample videos are read back and compared with what was written."""

from pathlib import Path

import av
import numpy as np
import pytest
from matplotlib.image import imread

from afd_scale.evaluation.video import (
    CAPTION_HEIGHT,
    CLIP_GAP,
    COLUMN_GAP,
    FRAME_GAP,
    LABEL_HEIGHT,
    MARGIN,
    TITLE_HEIGHT,
    read_title,
    write_comparison_mp4,
    write_grid,
    write_mp4,
)

# H.264 at CRF 16 and the round trip through YUV, per pixel value, where blocks are flat.
CODEC_TOLERANCE = 6


def _decoded(path: Path) -> np.ndarray:
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)


def _clips(seed: int, num_clips: int = 2) -> np.ndarray:
    """Every frame of every clip has its own grey level: misplaced ones are found."""
    levels = np.random.default_rng(seed).permutation(np.linspace(0, 255, num_clips * 5)).astype(np.uint8)
    return np.broadcast_to(levels.reshape(num_clips, 5, 1, 1), (num_clips, 5, 16, 16)).copy()


def test_grey_mp4_is_read_back(tmp_path):
    frames = np.kron(np.random.default_rng(0).integers(0, 256, (5, 4, 4)), np.ones((16, 16))).astype(np.uint8)
    write_mp4(frames, tmp_path / "new" / "clip.mp4", fps=8, title="a ball; $5")
    video = _decoded(tmp_path / "new" / "clip.mp4")
    assert video.shape == (5, 64, 64, 3)
    assert np.abs(video - frames[..., None]).max() <= 3 * CODEC_TOLERANCE
    assert np.abs(video - frames[..., None]).mean() <= 2
    assert read_title(tmp_path / "new" / "clip.mp4") == "a ball; $5"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["clip.mp4"]


def test_mp4_is_what_browsers_play(tmp_path):
    write_mp4(np.zeros((6, 16, 16), np.uint8), tmp_path / "clip.mp4", fps=12.5)
    with av.open(tmp_path / "clip.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == 12.5


def test_odd_colour_video_keeps_colours_and_becomes_even(tmp_path):
    frames = np.zeros((3, 33, 47, 3), np.uint8)
    frames[...] = 200, 60, 20
    write_mp4(frames, tmp_path / "clip.mp4", fps=8)
    video = _decoded(tmp_path / "clip.mp4")
    assert video.shape == (3, 34, 48, 3)
    assert np.abs(video - np.array([200, 60, 20])).max() <= CODEC_TOLERANCE


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    with pytest.raises((ValueError, OverflowError)):
        write_mp4(np.zeros((3, 16, 16), np.uint8), path, fps=float("nan"))
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("frames", [np.zeros((3, 8, 8)), np.zeros((8, 8), np.uint8), np.zeros((0, 8, 8), np.uint8)])
def test_frames_of_another_kind_are_refused(frames, tmp_path):
    with pytest.raises(ValueError, match=r"must be uint8 \(F, H, W\)"):
        write_mp4(frames, tmp_path / "clip.mp4", fps=8)


def test_comparison_sets_policies_side_by_side(tmp_path):
    columns = {"teacher": _clips(0), "base": _clips(1), "student": _clips(2)}
    captions = ["A dim ball, slowly", "价格 $5 / $6"]
    write_comparison_mp4(columns, captions, tmp_path)
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == ["00_a-dim-ball-slowly.mp4", "01_价格-5-6.mp4"]
    for row, (path, caption) in enumerate(zip(paths, captions, strict=True)):
        assert read_title(path) == caption
        video = _decoded(path)
        assert video.shape == (5, LABEL_HEIGHT + 240, 3 * 240 + 2 * CLIP_GAP, 3)
        for column, clips in enumerate(columns.values()):
            left = column * (240 + CLIP_GAP)
            inside = video[:, LABEL_HEIGHT + 20 : -20, left + 20 : left + 220]
            assert np.abs(inside - clips[row][:, :1, :1, None]).max() <= CODEC_TOLERANCE
            assert video[:, :LABEL_HEIGHT, left : left + 240].max() > 200, "its name is written above"


def test_a_caption_of_wide_letters_names_a_file(tmp_path):
    write_comparison_mp4({"base": _clips(0, 1)}, ["\U0001d538" * 80], tmp_path)
    (path,) = tmp_path.iterdir()
    assert read_title(path) == "\U0001d538" * 80


def test_grid_has_a_row_a_prompt_and_a_strip_a_policy(tmp_path):
    columns = {"teacher": _clips(0), "student": _clips(1)}
    write_grid(columns, [r"costs $\frac and $6", "second " * 80], tmp_path / "grid.png")
    pixels = np.round(imread(tmp_path / "grid.png")[..., :3] * 255)
    strip_width = 5 * (48 + FRAME_GAP) - FRAME_GAP
    assert pixels.shape[1] == 2 * MARGIN + 2 * strip_width + COLUMN_GAP
    row_height = (pixels.shape[0] - MARGIN - MARGIN - TITLE_HEIGHT + 16) // 2
    for column, clips in enumerate(columns.values()):
        left = MARGIN + column * (strip_width + COLUMN_GAP)
        for row in range(2):
            top = MARGIN + TITLE_HEIGHT + row * row_height
            assert pixels[top : top + CAPTION_HEIGHT, MARGIN:].max() > 150, "the prompt is written above"
            for frame in range(5):
                place = left + frame * (48 + FRAME_GAP)
                square = pixels[top + CAPTION_HEIGHT : top + CAPTION_HEIGHT + 48, place : place + 48]
                assert (square == clips[row, frame, 0, 0]).all()


def test_grid_of_long_large_clips_stays_small_and_shows_first_and_last(tmp_path):
    clip = np.full((1, 21, 480, 832, 3), 128, np.uint8)
    clip[:, 0], clip[:, -1] = 10, 250
    write_grid({"student": clip}, ["a prompt"], tmp_path / "grid.png")
    pixels = np.round(imread(tmp_path / "grid.png")[..., :3] * 255)
    assert max(pixels.shape) < 800
    middle = pixels[MARGIN + TITLE_HEIGHT + CAPTION_HEIGHT + 20]
    assert (middle[MARGIN + 5] == 10).all()
    assert (middle[-MARGIN - 5] == 250).all()


def test_a_caption_is_as_long_as_there_is_room(tmp_path):
    write_grid({"student": _clips(0, num_clips=1)}, ["ill " * 80], tmp_path / "grid.png")
    caption = imread(tmp_path / "grid.png")[MARGIN + TITLE_HEIGHT : MARGIN + TITLE_HEIGHT + CAPTION_HEIGHT, :, 0]
    end = np.flatnonzero(caption.max(axis=0) > 0.5).max()
    assert -20 < end - (caption.shape[1] - MARGIN) <= 0


def test_columns_that_do_not_match_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"columns .* must be of one shape"):
        write_grid({"base": _clips(0), "student": _clips(0)[:1]}, ["one", "two"], tmp_path / "grid.png")
    with pytest.raises(ValueError, match=r"captions \(1\) must be as many"):
        write_comparison_mp4({"base": _clips(0)}, ["one"], tmp_path)
