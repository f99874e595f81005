"""One viewer's seat: what they say is done, and what is made for them is sent."""

import asyncio
from collections import deque
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import asdict

from starlette.websockets import WebSocket

from afd_scale.config import one_line
from afd_scale.serving.line import FullError, Line
from afd_scale.serving.messages import ClosedError, Start, Told, packed, receive, send
from afd_scale.serving.studio import Studio
from afd_scale.serving.tape import Tape, mp4_of
from afd_scale.serving.viewer import Chunk, Limits, Note, Stream, Wish

_MOST_UNSENT = 64  # chunks and notes that wait to be sent to a viewer
_PIECE_BYTES = 256 * 1024  # of an mp4: chunks are sent between its pieces


class Seat:
    """One viewer's: their stream, and what is sent to them.

    Args:
        saving: makes mp4s, one at a time, whoever's they are.
    Attributes:
        stream: that waits, runs, or has ended and they are not told yet.
        last_sent: when something was sent to them, by the loop's clock.
    """

    def __init__(self, studio: Studio, line: Line, limits: Limits, saving: Executor, socket: WebSocket):
        self.studio, self.line, self.limits, self.saving, self.socket = studio, line, limits, saving, socket
        self.stream: Stream | None = None
        self.tape = self._new_tape()
        self._outbox: deque[tuple[Stream | None, Chunk | Note | ClosedError]] = deque()
        self._loop, self._more = asyncio.get_running_loop(), asyncio.Event()
        self._to_save: asyncio.Queue[list[bytes]] = asyncio.Queue()
        self._saves, self.last_sent = False, self._loop.time()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is made for the viewer, and nothing has to be sent."""
        return self.stream is None and not self._outbox and not self._saves

    def give_up(self, why: str) -> None:
        """Make `serve` end."""
        self._put(None, ClosedError(why, 1000))

    async def serve(self, told: Told) -> None:
        """Hear and send until something ends it.

        Args:
            told: the first message.
        Raises:
            ClosedError: the connection is to be closed.
            WebSocketDisconnect: the viewer has gone.
        """
        self._do(told)  # at once, for an idle seat may be taken away
        tasks = [asyncio.create_task(part) for part in (self._hear_all(), self._send_all(), self._save_all())]
        try:
            await asyncio.gather(*tasks)
        finally:
            self._leave()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # -- what the viewer says -----------------------------------------------------------------------------------------

    async def _hear_all(self) -> None:
        while True:
            self._do(await receive(self.socket))

    def _do(self, told: Told) -> None:
        if len(self._outbox) > _MOST_UNSENT:
            raise ClosedError(f"messages: {len(self._outbox)} answers wait to be sent, too many")
        if told.start is not None:
            self._start(told.start)
        if self.stream is not None:
            if told.prompt is not None:
                self.stream.ask(told.prompt)
            if told.shown is not None:
                self.stream.has_shown(told.shown)
            if told.stop:
                self.stream.leave()
        if told.save:
            self._save()

    def _start(self, start: Start) -> None:
        self._leave()
        frames = None if start.seconds is None else self.studio.frames_of(start.seconds)
        wish = Wish(start.prompt, start.seed, frames)
        stream = Stream(self.studio, self.line, self.limits.patience, wish, lambda item: self._send_of(stream, item))
        self.stream, self.tape = stream, self._new_tape()
        self._put(None, {"begun": {"seed": stream.seed}})
        try:
            self.line.join(stream.turn)
        except FullError as error:
            self.stream = None
            self._put(None, {"ended": one_line(error)})

    def _leave(self) -> None:
        if self.stream is not None:
            self.stream.leave()
            self.stream = None

    def _save(self) -> None:
        kept = self.tape.kept()
        if self._saves or not kept:
            why = "an mp4 is being saved already" if self._saves else "there is nothing to save yet"
            self._put(None, {"refused": why})
            return
        self._saves = True
        self._to_save.put_nowait(kept)

    def _new_tape(self) -> Tape:
        pixels = self.studio.pixels
        return Tape(pixels.fps, (pixels.height, pixels.width), self.limits.keep_seconds)

    # -- what is sent to them -----------------------------------------------------------------------------------------

    def _send_of(self, stream: Stream, item: Chunk | Note) -> None:
        """On any thread."""
        with suppress(RuntimeError):  # the server has stopped, nobody waits
            self._loop.call_soon_threadsafe(self._put, stream, item)

    def _put(self, stream: Stream | None, item: Chunk | Note | ClosedError) -> None:
        self._outbox.append((stream, item))
        self._more.set()

    async def _send_all(self) -> None:
        """Send what there is to send, in its order."""
        while True:
            await self._more.wait()
            self._more.clear()
            while self._outbox:
                stream, item = self._outbox[0]
                if isinstance(item, ClosedError):
                    raise item
                if stream is None or stream is self.stream:  # else it is no longer watched
                    await self._send_item(stream, item)
                self._outbox.popleft()

    async def _send_item(self, stream: Stream | None, item: Chunk | Note) -> None:
        if isinstance(item, Chunk):
            assert stream is not None
            await self._send_chunk(stream, item)
            return
        await self._send(item)
        if stream is not None and stream is self.stream and "ended" in item:
            self.stream = None

    async def _send_chunk(self, stream: Stream, chunk: Chunk) -> None:
        tape = self.tape
        pictures = await asyncio.to_thread(tape.pictures, chunk.frames)
        tape.keep(pictures)
        head = {"chunk": chunk.number, "prompt": chunk.prompt, "type": tape.media_type,
                "figures": asdict(chunk.figures)}  # fmt: skip
        stream.has_sent(chunk.number + 1)  # before, for the viewer may answer at once
        await self._send(packed(head, pictures))

    async def _save_all(self) -> None:
        """Make and send each mp4 that is asked for, while chunks are sent."""
        while True:
            kept = await self._to_save.get()
            fps = self.studio.pixels.fps
            video = await self._loop.run_in_executor(self.saving, mp4_of, kept, fps)
            starts = range(0, len(video), _PIECE_BYTES)
            for piece, start in enumerate(starts):
                head = {"saved": round(len(kept) / fps, 1), "piece": piece, "pieces": len(starts), "type": "video/mp4"}
                await self._send(packed(head, [video[start : start + _PIECE_BYTES]]))
            self._saves = False

    async def _send(self, message: Note | bytes) -> None:
        await send(self.socket, message, self.limits.patience.stall_seconds)
        self.last_sent = self._loop.time()
