"""Where viewers come in: they say who they are and what they want, then they have a seat."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

from starlette.websockets import WebSocket, WebSocketDisconnect

from afd_scale.config import one_line
from afd_scale.serving.door import Door
from afd_scale.serving.line import Line
from afd_scale.serving.messages import ClosedError, Told, close, receive
from afd_scale.serving.seat import Seat
from afd_scale.serving.studio import Studio
from afd_scale.serving.viewer import Limits

log = logging.getLogger(__name__)

_HELLO_SECONDS = 10.0  # for the first message
_MOST_STRANGERS = 32  # whose first message is waited for


class Hall:
    """Serves viewers, a bounded number of them.

    Who has said nothing yet has no seat. They are a bounded number too, of which the oldest goes when another one
    comes: a viewer says at once what they want, so the silent ones keep nobody out.
    """

    def __init__(self, studio: Studio, line: Line, door: Door, limits: Limits):
        self.studio, self.line, self.door, self.limits = studio, line, door, limits
        self._strangers: list[asyncio.Timeout] = []  # the oldest first
        self._seats: list[Seat] = []
        self._saving = ThreadPoolExecutor(1, "mp4")  # one who goes meanwhile lets no second one begin

    @property
    def viewers(self) -> int:
        """Who watch or wait."""
        return sum(not seat.is_idle for seat in self._seats)

    async def serve(self, socket: WebSocket) -> None:
        """Serve one viewer until they go."""
        await socket.accept()
        try:
            told = await self._greet(socket)
            seat = self._seat(socket)
            try:
                await seat.serve(told)
            finally:
                self._clear(seat)
        except WebSocketDisconnect:
            pass
        except ClosedError as error:
            await close(socket, error)
        except Exception as error:  # whatever one viewer meets, they are told, and the others are served
            log.error("a viewer could not be served: %s: %s", type(error).__name__, one_line(error))
            await close(socket, ClosedError("the server failed: its log says why", 1011))

    async def _greet(self, socket: WebSocket) -> Told:
        """The first message of one who may come in."""
        if len(self._strangers) >= _MOST_STRANGERS:
            oldest = self._strangers.pop(0)
            if not oldest.expired():
                oldest.reschedule(0)
        patience = asyncio.timeout(_HELLO_SECONDS)
        try:
            async with patience:
                self._strangers.append(patience)
                told = await receive(socket)
        except TimeoutError:
            raise ClosedError("nothing was asked for in time") from None
        finally:
            self._strangers = [other for other in self._strangers if other is not patience]
        if not self.door.knows(told.token):
            raise ClosedError("token: this server wants another one")
        return told

    def _seat(self, socket: WebSocket) -> Seat:
        """A free one, or that of the viewer whose stream is over for the longest."""
        if len(self._seats) >= self.limits.viewers:
            idle = [seat for seat in self._seats if seat.is_idle]
            if not idle:
                raise ClosedError(f"{self.viewers} watch or wait already, as many as may: try again later", 1013)
            longest = min(idle, key=lambda seat: seat.last_sent)
            longest.give_up("the stream is over, and somebody else has come: Start begins another one")
            self._clear(longest)
        seat = Seat(self.studio, self.line, self.limits, self._saving, socket)
        self._seats.append(seat)
        return seat

    def _clear(self, seat: Seat) -> None:
        self._seats = [other for other in self._seats if other is not seat]
