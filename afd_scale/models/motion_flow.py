"""Optical flow of clips, pooled to cells, here or in processes of their own.

Nothing here imports torch, which each of those processes would load.

Shape suffixes: T frames, H rows, W columns, G cells along each side.
"""

import atexit
import signal
from collections.abc import Iterable
from contextlib import suppress
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import numpy as np

from afd_scale.config import LostInputError
from afd_scale.mp4 import FrameArray
from afd_scale.vision import FloatArray, luma, make_flow, one_thread_each, with_flow_rows


class FlowPool:
    """Flow of several clips.

    Args:
        grid: G.
        workers: processes. They start with the first clips and end with this process, however it ends; 0 is this one.
    """

    def __init__(self, grid: int, workers: int):
        self.grid, self.num_workers = grid, workers
        self._workers: dict[Connection, Any] = {}

    def __call__(self, clips: Iterable[FrameArray]) -> list[FloatArray]:
        """See `cell_flow`; a clip is asked for when a process is free for it.

        Raises:
            LostInputError: a process has ended.
        """
        if not self.num_workers:
            return [cell_flow(clip, self.grid) for clip in clips]
        if not self._workers:
            self._start()
        found: dict[int, FloatArray] = {}
        busy: dict[Connection, int] = {}
        numbered = enumerate(clips)
        idle = list(self._workers)
        while True:
            for worker, (number, clip) in zip(idle, numbered):
                self._talk(worker, clip)
                busy[worker] = number
            if not busy:
                return [found[number] for number in sorted(found)]
            idle = cast("list[Connection]", wait(list(busy)))
            for worker in idle:
                found[busy.pop(worker)] = self._talk(worker)

    def close(self) -> None:
        """End the processes."""
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.close()
        for process in self._workers.values():
            process.join()
        self._workers = {}

    def _start(self) -> None:
        context = get_context("spawn")  # a fork of a process with threads, such as torch's and OpenCV's, may hang
        for _ in range(self.num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, self.grid))
            process.start()
            theirs.close()
            self._workers[ours] = process
        # Last in, first out: before multiprocessing waits at exit for what it has started.
        atexit.register(self.close)

    def _talk(self, worker: Connection, clip: FrameArray | None = None) -> Any:
        """Send a clip, or receive the flow of the one before."""
        try:
            return worker.recv() if clip is None else worker.send(clip)
        except (EOFError, ConnectionError) as error:
            process = self._workers[worker]
            process.join()
            raise LostInputError(f"workers ({self.num_workers}) must live, perhaps be fewer: one that computes the "
                                 f"flow which a judge sees ended with {process.exitcode}; -9 is out of memory"
                                 ) from error  # fmt: skip


def cell_flow(frames: FrameArray, grid: int) -> FloatArray:
    """Flow between the frames (T, H, W[, 1 or 3]) of a clip, T >= 2.

    Returns:
        (T - 1, 3, G, G) in frame heights: of each cell to the right, down, and the spread.
    """
    flow, grey = make_flow(), [luma(frame) for frame in with_flow_rows(frames)]
    height, width = grey[0].shape
    rows, columns = shares(height, width, grid)

    def cells(first: FrameArray, second: FrameArray) -> FloatArray:
        mean, spread = pooled(flow(first, second).transpose(2, 0, 1) / height, rows, columns)
        return np.concatenate([mean, spread])

    return np.stack([cells(first, second) for first, second in pairwise(grey)])


def shares(rows: int, columns: int, grid: int) -> tuple[FloatArray, FloatArray]:
    """What share a row has of each row of cells (G, H), and a column of each column of cells (W, G)."""

    def overlap(size: int) -> FloatArray:
        edges, pixel = np.linspace(0, size, grid + 1)[:, None], np.arange(size)
        inside = np.minimum(pixel + 1, edges[1:]) - np.maximum(pixel, edges[:-1])
        return (inside.clip(0) * grid / size).astype(np.float32)

    return overlap(rows), overlap(columns).T


def pooled(flow: Any, rows: Any, columns: Any) -> tuple[Any, Any]:
    """Mean (..., 2, G, G) and spread (..., 1, G, G) of flow (..., 2, H, W) in each cell, of arrays or of tensors.

    Args:
        rows, columns: `shares` of H and W.
    """
    mean, square = rows @ flow @ columns, rows @ (flow * flow) @ columns
    variance = (square - mean * mean).clip(0)
    return mean, (variance[..., :1, :, :] + variance[..., 1:, :, :]) ** 0.5


def _work(clips: Connection, grid: int) -> None:
    """A process: it ends when the one that started it closes the pipe or is gone, and not when a job is told to stop,
    which it is then still needed for."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    one_thread_each()
    with suppress(EOFError, ConnectionError):
        while True:
            clips.send(cell_flow(clips.recv(), grid))
