"""One who watches a stream: what the worker makes for them, and how much of it they have seen.

The worker and the viewer's connection are two threads. The worker sends chunks through `send`; the connection says
what was shown, which prompt is wanted now, and that the viewer has gone.
"""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from afd_scale.config import ConfigError, one_line
from afd_scale.generation.generate import Clock
from afd_scale.mp4 import FrameArray
from afd_scale.serving.line import LeftError, Line, Turn
from afd_scale.serving.studio import Figures, Studio

AHEAD_CHUNKS = 2  # that are made and not shown, at most


@dataclass(frozen=True)
class Patience:
    """How long a stream may hold the worker.

    Attributes:
        stall_seconds: without anything shown.
        turn_seconds: in all, once others wait.
        stream_seconds: of video, whoever waits.
    """

    stall_seconds: float = 30.0
    turn_seconds: float = 120.0
    stream_seconds: float = 3600.0


@dataclass(frozen=True)
class Limits:
    """How much is served.

    Attributes:
        viewers: who may watch or wait; more are told to try later.
        patience: with each stream.
        keep_seconds: of a stream's end that can be saved.
    """

    viewers: int = 8
    patience: Patience = field(default_factory=Patience)
    keep_seconds: float = 120.0


@dataclass(frozen=True)
class Chunk:
    """Frames to show.

    Attributes:
        number: counted from 0.
        frames: (t, H, W, C).
        prompt: that they were made for.
    """

    number: int
    frames: FrameArray
    prompt: str
    figures: Figures


@dataclass(frozen=True)
class Wish:
    """What a viewer asks for.

    Attributes:
        seed: of the noise; None draws one.
        frames: in all; None goes on until it is stopped.
    """

    prompt: str
    seed: int | None = None
    frames: int | None = None


Note = dict[str, Any]  # what is told besides chunks, JSON


class Stream:
    """One stream for one viewer; it begins when it has joined the line.

    Args:
        send: takes chunks and notes in their order, on any thread, and must not wait.
    """

    def __init__(
        self, studio: Studio, line: Line, patience: Patience, wish: Wish, send: Callable[[Chunk | Note], None]
    ):
        self.studio, self.line, self.patience, self.send = studio, line, patience, send
        self.seed = secrets.randbelow(2**31) if wish.seed is None else wish.seed
        self.frames = wish.frames
        self.turn = Turn(self._make, lambda place: send({"place": place}))
        self._wanted = wish.prompt  # by the viewer, of this moment
        self._made, self._sent, self._shown = 0, 0, 0  # chunks

    def ask(self, prompt: str) -> None:
        """Change the prompt, from the next chunk on."""
        self._wanted = prompt

    def has_sent(self, chunks: int) -> None:
        """So many chunks were given to the viewer's connection."""
        self._sent = chunks

    def has_shown(self, chunks: int) -> None:
        """The viewer says that so many chunks are on the screen, or were; what was not sent was not shown."""
        self._shown = max(self._shown, min(chunks, self._sent))
        self.turn.wake()

    def leave(self) -> None:
        """End it; it says so, unless it is over."""
        if self.line.leave(self.turn):
            self.send({"ended": "it was stopped"})

    def _make(self, turn: Turn) -> None:
        """All of the stream, on the worker's thread."""
        try:
            end = self._make_chunks(turn)
        except LeftError:
            end = "it was stopped"
        except ValueError as error:
            self.send({"refused": one_line(error)})
            end = "it could not be made"
        except Exception:
            self.send({"ended": "the server failed: its log says why"})
            raise
        self.send({"ended": end})

    def _make_chunks(self, turn: Turn) -> str:
        """Returns why it ends."""
        clock, prompt = Clock(self.studio.device), _Prompt(self)
        began, frames = time.monotonic(), 0
        most = self.studio.frames_of(self.patience.stream_seconds)
        length = most if self.frames is None else min(self.frames, most)
        for video in self.studio.stream(prompt.text, self.seed, length, clock, turn.check):
            frames += len(video)
            number, self._made = self._made, self._made + 1
            self.send(Chunk(number, video, prompt.shown, self.studio.figures(clock, frames)))
            if not turn.wait_for(self._has_room, self.patience.stall_seconds):
                return f"nothing was shown for {self.patience.stall_seconds:g} s"
            if self.line.waiting and time.monotonic() - began > self.patience.turn_seconds:
                return f"others wait, and this stream had its {self.patience.turn_seconds:g} s"
        return "it is whole"

    def _has_room(self) -> bool:
        return self._made - self._shown < AHEAD_CHUNKS


class _Prompt:
    """The prompt of the next chunk: the wanted one, unless that cannot be had; then the one before goes on."""

    def __init__(self, stream: Stream):
        self.stream = stream
        self.shown, self._asked = "", ""
        self._text: Tensor | None = None

    def text(self, chunk: int) -> Tensor:
        """(1, T, E) of a chunk that is about to begin; raises ConfigError where there was none before."""
        wanted = self.stream._wanted
        if self._text is None or wanted != self._asked:
            self._asked = wanted
            try:
                self._text, self.shown = self.stream.studio.embed(wanted), wanted
            except ConfigError as error:
                if self._text is None:
                    raise
                self.stream.send({"refused": one_line(error)})
        return self._text
