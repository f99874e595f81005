"""Sample videos: mp4s that every browser plays, and a film-strip grid of several policies."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np

from afd_scale.files import replacing, slug
from afd_scale.mp4 import FrameArray, coloured, encoding_mp4

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Layout of grids and comparisons, in pixels. Toy clips are enlarged, Wan clips shrunk, by whole factors.
STRIP_FRAME_SIZES = (48, 120)
STRIP_WIDTH = 640
COMPARISON_FRAME_SIZES = (240, 480)
MARGIN, COLUMN_GAP, ROW_GAP, FRAME_GAP, CLIP_GAP = 28, 24, 16, 2, 10
TITLE_HEIGHT, CAPTION_HEIGHT, LABEL_HEIGHT = 36, 24, 44
# Dark, so that it suits light and dark pages alike.
BACKGROUND, TITLE_COLOUR, CAPTION_COLOUR = (33, 37, 45), "#ffffff", "#b6bdc9"
DOTS_PER_INCH = 100

_Label = tuple[float, float, str, float, str]  # x, baseline y from the top, text, points, colour


def write_mp4(frames: FrameArray, path: Path, fps: float, title: str = "") -> None:
    """Write one video; see `writing_mp4`.

    Args:
        frames: uint8 (F, H, W) or (F, H, W, 3).
    """
    with writing_mp4(path, fps, title=title) as write:
        write(frames)


@contextmanager
def writing_mp4(path: Path, fps: float, title: str = "", comment: str = "") -> Iterator[Callable[[FrameArray], None]]:
    """Write one video frame by frame, as `encoding_mp4`; the file appears when the block ends well.

    Args:
        title: kept in the file, `read_title` finds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, encoding_mp4(partial, fps, title, comment) as write:
        yield write


def read_mp4(path: Path) -> tuple[FrameArray, float]:
    """(F, H, W, 3) frames of a file that was written here, and how many there are a second."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return frames, float(stream.average_rate or 0)


def read_title(path: Path) -> str:
    """The title that `write_mp4` kept in the file, or an empty string."""
    with av.open(path) as container:
        return str(container.metadata.get("title", ""))


def write_grid(columns: Mapping[str, FrameArray], captions: Sequence[str], path: Path) -> None:
    """Write one png: a row for each prompt, in each column the film strip of one policy.

    Args:
        columns: name of the policy to its N clips, uint8 (N, F, H, W) or (N, F, H, W, 3), all of one shape.
            Frames that do not fit into a strip are left out evenly.
        captions: N prompts.
    """
    clips = _checked(columns, captions)
    strips = {name: [_strip(clip) for clip in policy_clips] for name, policy_clips in clips.items()}
    strip_height, strip_width = next(iter(strips.values()))[0].shape[:2]
    row_height = CAPTION_HEIGHT + strip_height + ROW_GAP
    width = 2 * MARGIN + len(strips) * (strip_width + COLUMN_GAP) - COLUMN_GAP
    height = 2 * MARGIN + TITLE_HEIGHT + len(captions) * row_height - ROW_GAP
    canvas = _canvas(height, width)
    labels: list[_Label] = []
    for row, caption in enumerate(captions):
        top = MARGIN + TITLE_HEIGHT + row * row_height
        short = _shortened(caption, 10, width - 2 * MARGIN)
        labels.append((MARGIN, top + CAPTION_HEIGHT - 7, short, 10, CAPTION_COLOUR))
        for column, policy_strips in enumerate(strips.values()):
            left = MARGIN + column * (strip_width + COLUMN_GAP)
            _paste(canvas, policy_strips[row], top + CAPTION_HEIGHT, left)
    for column, name in enumerate(strips):
        left = MARGIN + column * (strip_width + COLUMN_GAP)
        labels.append((left, MARGIN + 14, name, 13, TITLE_COLOUR))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        _figure(canvas, labels).savefig(partial, format="png")


def write_comparison_mp4(
    columns: Mapping[str, FrameArray], captions: Sequence[str], folder: Path, fps: float = 8.0
) -> None:
    """Write one mp4 for each prompt, the policies side by side below their names.

    Args:
        columns: name of the policy to its N clips, uint8 (N, F, H, W) or (N, F, H, W, 3), all of one shape.
        captions: N prompts; each is the title of its file and part of its name.
        folder: gains `00_<prompt>.mp4` and so on.
    """
    clips = {name: [_fit(clip, COMPARISON_FRAME_SIZES) for clip in policy_clips]
             for name, policy_clips in _checked(columns, captions).items()}  # fmt: skip
    num_frames, clip_height, clip_width = next(iter(clips.values()))[0].shape[:3]
    step = clip_width + CLIP_GAP
    labels = [
        (column * step + 12.0, LABEL_HEIGHT - 14.0, name, 17.0, TITLE_COLOUR) for column, name in enumerate(clips)
    ]
    blank = _canvas(LABEL_HEIGHT + clip_height, len(clips) * step - CLIP_GAP)
    labelled = _rendered(_figure(blank, labels))
    for row, caption in enumerate(captions):
        video = np.repeat(labelled[None], num_frames, axis=0)
        for column, policy_clips in enumerate(clips.values()):
            video[:, LABEL_HEIGHT:, column * step : column * step + clip_width] = policy_clips[row]
        write_mp4(video, folder / f"{row:02d}_{slug(caption)}.mp4", fps, title=caption)


def _checked(columns: Mapping[str, FrameArray], captions: Sequence[str]) -> dict[str, FrameArray]:
    """The columns as RGB, (N, F, H, W, 3) each."""
    clips = {name: coloured(frames, 5) for name, frames in columns.items()}
    shapes = {name: frames.shape for name, frames in clips.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"columns ({shapes}) must be of one shape, at least one: their frames are set side by side")
    if len(next(iter(clips.values()))) != len(captions):
        raise ValueError(f"captions ({len(captions)}) must be as many as the clips of a column: one for each clip")
    return clips


def _scaled(frames: FrameArray, enlarge: int, shrink: int) -> FrameArray:
    """Repeat each pixel `enlarge` times, or average `shrink` x `shrink` pixels; (F, H, W, 3)."""
    if enlarge > 1:
        return frames.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    if shrink > 1:
        height, width = frames.shape[1] // shrink * shrink, frames.shape[2] // shrink * shrink
        sums = sum(frames[:, row:height:shrink, column:width:shrink].astype(np.uint32)
                   for row in range(shrink) for column in range(shrink))  # fmt: skip
        return np.asarray((sums + shrink**2 // 2) // shrink**2, dtype=np.uint8)
    return frames


def _fit(frames: FrameArray, sizes: tuple[int, int]) -> FrameArray:
    """Scale so that the longer side lies between two sizes, as far as whole factors allow; (F, H, W, 3)."""
    longer = max(frames.shape[1:3])
    return _scaled(frames, enlarge=max(1, sizes[0] // longer), shrink=-(-longer // sizes[1]))


def _strip(clip: FrameArray) -> FrameArray:
    """(F, H, W, 3) to (h, w, 3): frames from the first to the last, as many as fit, left to right."""
    num_frames, (height, width) = len(clip), _fit(clip[:1], STRIP_FRAME_SIZES).shape[1:3]
    shown = max(1, min(num_frames, (STRIP_WIDTH + FRAME_GAP) // (width + FRAME_GAP)))
    frames = _fit(clip[np.linspace(0, num_frames - 1, shown).round().astype(int)], STRIP_FRAME_SIZES)
    strip = _canvas(height, shown * (width + FRAME_GAP) - FRAME_GAP)
    for place, frame in enumerate(frames):
        _paste(strip, frame, 0, place * (width + FRAME_GAP))
    return strip


def _canvas(height: int, width: int) -> FrameArray:
    return np.full((height, width, 3), BACKGROUND, dtype=np.uint8)


def _paste(canvas: FrameArray, image: FrameArray, top: int, left: int) -> None:
    canvas[top : top + image.shape[0], left : left + image.shape[1]] = image


def _figure(image: FrameArray, labels: Sequence[_Label]) -> Figure:
    """A figure of exactly these pixels with text on it; no pyplot, so no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second to import, for the rank that draws
    from matplotlib.figure import Figure

    height, width = image.shape[:2]
    figure = Figure(figsize=(width / DOTS_PER_INCH, height / DOTS_PER_INCH), dpi=DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    figure.figimage(image, origin="upper")
    for x, y, text, points, colour in labels:
        # Prompts are plain text: a "$" in them starts no formula.
        figure.text(x / width, 1 - y / height, text, fontsize=points, color=colour, parse_math=False)
    return figure


def _shortened(text: str, points: float, width: float) -> str:
    """As much of a line as fits into so many pixels."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    def pixels(line: str) -> float:
        measured = text_to_path.get_text_width_height_descent(line, FontProperties(size=points), ismath=False)
        return float(measured[0]) * DOTS_PER_INCH / 72

    text = " ".join(text.split())
    if pixels(text) <= width:
        return text
    fits = bisect.bisect(range(len(text)), width, key=lambda end: pixels(f"{text[:end]} ...")) - 1
    return f"{text[:fits].rstrip()} ..."


def _rendered(figure: Figure) -> FrameArray:
    canvas: Any = figure.canvas  # FigureCanvasAgg
    canvas.draw()
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[..., :3]
