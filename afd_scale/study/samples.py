"""The methods' sample videos side by side, cut out of those that each run left."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path

from afd_scale.evaluation.report import newest_samples
from afd_scale.evaluation.video import CLIP_GAP, LABEL_HEIGHT, read_mp4, read_title, write_comparison_mp4, write_grid
from afd_scale.mp4 import FrameArray
from afd_scale.study.plan import Plan
from afd_scale.study.results import STUDENT, Record
from afd_scale.study.runs import Place

log = logging.getLogger(__name__)

PROMPTS, GRID_PROMPTS = 3, 2  # as videos, and in the picture
COLUMNS = ("teacher", "base", STUDENT)  # of a run's videos, those that were measured

Clips = dict[str, FrameArray]  # by policy or method


def write_samples(plan: Plan, place: Place, records: Mapping[str, Record], failed: Collection[str]) -> list[Path]:
    """Videos of teacher, base and all methods of the first seed and base, and a picture of them, in `samples/`.

    Returns:
        The videos; none where no run has left any here.
    """
    import numpy as np

    by_prompt: dict[str, Clips] = {}
    titles: dict[str, str] = {}
    fps = 0.0
    for name in plan.study.methods:
        trials = plan.row(name, plan.steps_of(name), records, failed)
        first = next((records[trial.name] for trial in trials if trial.name in records), None)
        if first is None:
            continue
        for path in _videos(place.out / first.name)[:PROMPTS]:
            clips, fps = _cut(path, [column for column in COLUMNS if column in first.metrics])
            titles.setdefault(path.name, read_title(path))
            shown = by_prompt.setdefault(path.name, {})
            for column, frames in clips.items():
                shown.setdefault(name if column == STUDENT else column, frames)
    # A prompt of all, in frames of one shape: runs may have settings of their own.
    most = max((len(clips) for clips in by_prompt.values()), default=0)
    prompts = {file: _ordered(clips) for file, clips in by_prompt.items() if len(clips) == most}
    if not prompts or len({frames.shape for clips in prompts.values() for frames in clips.values()}) > 1:
        return []
    folder = place.out / "samples"
    captions = [titles[file] for file in prompts]
    names = list(next(iter(prompts.values())))
    together = {name: np.stack([clips[name] for clips in prompts.values()]) for name in names}
    write_comparison_mp4(together, captions, folder, fps)
    shown_prompts = list(prompts.values())[:GRID_PROMPTS]
    write_grid({f"prompt {number}": np.stack([clips[name] for name in names])
                for number, clips in enumerate(shown_prompts, 1)}, names, folder / "grid.png")  # fmt: skip
    return sorted(folder.glob("*.mp4"))[: len(prompts)]


def _videos(run: Path) -> list[Path]:
    return [path for path in newest_samples(run / "samples") if path.suffix == ".mp4"]


def _ordered(clips: Clips) -> Clips:
    """Teacher and base first."""
    return {name: clips[name] for name in sorted(clips, key=lambda name: (COLUMNS + (name,)).index(name))}


def _cut(path: Path, columns: list[str]) -> tuple[Clips, float]:
    """The clips of a video of `write_comparison_mp4`, (F, H, W, 3) each, and frames a second."""
    frames, fps = read_mp4(path)
    step = (frames.shape[2] + CLIP_GAP) // len(columns)
    clips = frames[:, LABEL_HEIGHT:]
    return {column: clips[:, :, at * step : at * step + step - CLIP_GAP] for at, column in enumerate(columns)}, fps
