"""A stream keeps at most two chunks ahead of its viewer, follows their prompt, and ends when it should."""

import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from afd_scale.config import ConfigError
from afd_scale.serving.line import Line
from afd_scale.serving.viewer import AHEAD_CHUNKS, Chunk, Patience, Stream, Wish
from tests.live_server import until

CPU = torch.device("cpu")


@dataclass
class Numbers:
    """A studio whose chunks are one frame each, which shows the number that the prompt is."""

    device: torch.device = CPU
    made: int = 0
    fails: bool = False
    embedded: list[str] = field(default_factory=list)

    def embed(self, prompt):
        if not prompt.isdecimal():
            raise ConfigError(f"prompt ({prompt}) must be a number")
        self.embedded.append(prompt)
        return torch.tensor(int(prompt))

    def frames_of(self, seconds):
        return round(seconds)

    def figures(self, clock, frames):
        return SimpleNamespace(frames=frames)

    def stream(self, text, seed, frames, clock, check):
        for number in range(frames):
            check()
            if self.fails:
                raise RuntimeError("CUDA out of memory")
            self.made += 1
            yield np.full((1, 2, 2, 1), int(text(number)), np.uint8)


@pytest.fixture
def line():
    line = Line(4)
    yield line
    line.close(5)


class Viewer:
    """A stream, and what came of it."""

    def __init__(self, line, wish=None, **patience):
        self.got, self.studio = [], Numbers()
        self.sends = True
        self.stream = Stream(self.studio, line, Patience(**patience), wish or Wish("1"), self.send)
        line.join(self.stream.turn)

    def send(self, item):
        self.got.append(item)
        if isinstance(item, Chunk) and self.sends:
            self.stream.has_sent(item.number + 1)

    @property
    def chunks(self):
        return [item for item in self.got if isinstance(item, Chunk)]

    @property
    def end(self):
        return next((item["ended"] for item in self.got if isinstance(item, dict) and "ended" in item), None)

    def told(self, name):
        return [item[name] for item in self.got if isinstance(item, dict) and name in item]


def test_it_is_never_more_than_two_chunks_ahead(line):
    viewer = Viewer(line)
    for shown in (0, 1, 2, 5):
        viewer.stream.has_shown(shown)
        expected = min(shown, len(viewer.chunks)) + AHEAD_CHUNKS if shown < 5 else len(viewer.chunks) + AHEAD_CHUNKS
        until(lambda expected=expected: len(viewer.chunks) >= expected)
        time.sleep(0.03)
        assert viewer.studio.made == len(viewer.chunks) == expected
    assert [chunk.number for chunk in viewer.chunks] == list(range(len(viewer.chunks)))
    viewer.stream.has_shown(10**9)  # more than there are: those that are there
    time.sleep(0.03)
    assert viewer.studio.made == expected + AHEAD_CHUNKS
    viewer.sends = False
    for _ in range(3):
        viewer.stream.has_shown(10**9)  # more than were sent: those that were
        time.sleep(0.03)
    assert viewer.studio.made == expected + 2 * AHEAD_CHUNKS


def test_a_prompt_holds_from_the_next_chunk_on(line):
    viewer = Viewer(line)
    until(lambda: len(viewer.chunks) == 2)
    viewer.stream.ask("7")
    viewer.stream.has_shown(1)
    until(lambda: len(viewer.chunks) == 3)
    assert [(int(chunk.frames[0, 0, 0, 0]), chunk.prompt) for chunk in viewer.chunks] == [(1, "1"), (1, "1"), (7, "7")]
    viewer.stream.ask("no number")
    viewer.stream.has_shown(3)
    until(lambda: len(viewer.chunks) == 5)
    assert viewer.told("refused") == ["prompt (no number) must be a number"], "it is said once"
    assert [chunk.prompt for chunk in viewer.chunks] == ["1", "1", "7", "7", "7"]
    assert viewer.studio.embedded == ["1", "7"]
    viewer.stream.leave()


def test_a_first_prompt_that_cannot_be_had_ends_it(line):
    viewer = Viewer(line, Wish("no number"))
    until(lambda: viewer.end)
    assert (viewer.told("refused"), viewer.end) == (["prompt (no number) must be a number"], "it could not be made")


def test_one_who_goes_frees_the_worker_at_once(line):
    viewer, next_one = Viewer(line), Viewer(line)
    until(lambda: len(viewer.chunks) == 2)
    assert not next_one.chunks
    viewer.stream.leave()
    assert until(lambda: bool(next_one.chunks)) < 5
    assert viewer.end == "it was stopped"
    waiting = Viewer(line)
    waiting.stream.leave()
    assert waiting.end == "it was stopped", "one who still waits is told as well"
    next_one.stream.leave()


def test_one_who_looks_at_nothing_is_not_waited_for(line):
    viewer = Viewer(line, stall_seconds=0.05)
    until(lambda: viewer.end)
    assert viewer.end == "nothing was shown for 0.05 s"
    assert len(viewer.chunks) == 2
    until(lambda: line.is_free)


def test_a_turn_ends_when_others_wait(line):
    viewer = Viewer(line, turn_seconds=0.1)

    def show():
        viewer.stream.has_shown(len(viewer.chunks))
        time.sleep(0.01)
        return viewer.end

    began = time.monotonic()
    while time.monotonic() - began < 0.2:
        assert not show(), "nobody else waits"
    next_one = Viewer(line)
    until(show)
    assert viewer.end == "others wait, and this stream had its 0.1 s"
    until(lambda: next_one.chunks)
    next_one.stream.leave()


@pytest.mark.parametrize(("frames", "longest", "made"), [(2, 9, 2), (None, 2, 2), (5, 1, 1)])
def test_it_has_the_length_that_was_asked_for(line, frames, longest, made):
    viewer = Viewer(line, Wish("1", frames=frames), stream_seconds=longest)
    until(lambda: (viewer.stream.has_shown(9), viewer.end)[1])
    assert (len(viewer.chunks), viewer.end) == (made, "it is whole")


def test_a_failure_is_told_without_its_words(line, caplog):
    viewer = Viewer(line)
    until(lambda: len(viewer.chunks) == 2)
    viewer.studio.fails = True
    viewer.stream.has_shown(1)
    until(lambda: viewer.end)
    assert viewer.end == "the server failed: its log says why"
    until(lambda: line.is_free)
    assert "RuntimeError: CUDA out of memory" in caplog.text
