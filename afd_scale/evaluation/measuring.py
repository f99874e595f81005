"""Measure the clips of a set, in several processes."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

from afd_scale.codecs.codec import RejectedError, VideoForm
from afd_scale.config import ConfigError
from afd_scale.data.clips import Clip, Reject
from afd_scale.evaluation.clip_sets import ClipSet, Load
from afd_scale.evaluation.comparison import MeasuredClip
from afd_scale.evaluation.suites.video import ClipMeasures, measure_long_clip
from afd_scale.vision import one_thread_each

Found = ClipMeasures | str  # or why there is nothing
_AHEAD = 2  # clips a process that wait for it; they may hold frames


def measure_set(
    clip_set: ClipSet,
    chosen: Sequence[Clip],
    form: VideoForm,
    borders: Sequence[int] | None = None,
    workers: int = 1,
    lengths: int = 1,
    on_clip: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[MeasuredClip], list[Reject]]:
    """Measure clips of one side.

    Args:
        chosen: clips of the set.
        form: that they are brought to.
        borders: see `measure_clip`.
        workers: processes; 1 is this one.
        lengths: how often as long as the form's the clips are, each length of which is measured by itself, too.
        on_clip: takes how many are done, and how many there are.
    Returns:
        What was measured, and what could not be, with the reason.
    Raises:
        ConfigError: a process was killed.
    """
    measured, rejects = [], []
    loads = clip_set.loads(chosen, replace(form, frames=lengths * form.frames))
    measure = partial(_measure, form=form, borders=borders, lengths=lengths)
    results = ((clip, measure(load)) for clip, load in loads) if workers == 1 else _spawned(loads, measure, workers)
    for done, (clip, found) in enumerate(results, 1):
        if isinstance(found, str):
            rejects.append(Reject(clip.video, clip.prompt, found))
        else:
            measured.append(MeasuredClip(clip.video, clip.prompt, clip.split, found))
        on_clip(done, len(chosen))
    return measured, rejects


def _measure(load: Load, form: VideoForm, borders: Sequence[int] | None, lengths: int) -> Found:
    try:
        clip = load()
    except RejectedError as error:
        return str(error)
    return measure_long_clip(clip, form.fps, borders, form.frames, lengths)


def _spawned(
    loads: Iterator[tuple[Clip, Load]], measure: Callable[[Load], Found], workers: int
) -> Iterator[tuple[Clip, Found]]:
    """Each clip and what was found, in their order."""
    waiting: deque[tuple[Clip, Future[Found]]] = deque()
    # A fork of a process with threads, such as torch's and OpenCV's, may hang.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=one_thread_each) as pool:
        try:
            for clip, load in loads:
                waiting.append((clip, pool.submit(measure, load)))
                if len(waiting) > _AHEAD * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            yield from ((clip, future.result()) for clip, future in waiting)
        except BrokenProcessPool as error:
            raise ConfigError(f"workers ({workers}) must be fewer: one was killed, perhaps for its memory") from error
