"""What a viewer's websocket carries.

It takes JSON texts, each of some of the fields of `Told`, and gives JSON texts (place in the line, begun, refused,
ended, closed) and bytes: a length in four bytes, a JSON head of that length, then the pictures of a chunk, or a piece
of an mp4, that the head gives the lengths of.
"""

import asyncio
import json
import struct
from contextlib import suppress
from typing import Any

from pydantic import Field, TypeAdapter
from starlette.websockets import WebSocket, WebSocketDisconnect

from afd_scale.config import one_line
from afd_scale.config.section import Section
from afd_scale.files import checked_json
from afd_scale.generation.job import MOST
from afd_scale.serving.shelf import Prompt, Seed

MOST_MESSAGE_BYTES = 32 * 1024  # of a viewer's
_GOODBYE_SECONDS = 5.0  # for saying why a connection ends


class Start(Section):
    """A stream that is asked for."""

    prompt: Prompt
    """What is to be seen first."""
    seed: Seed | None = None
    """Of the noise; None draws one."""
    seconds: float | None = Field(default=None, gt=0, le=MOST)
    """Of video; None goes on until it is stopped."""


class Told(Section):
    """What a viewer says."""

    token: str | None = Field(default=None, max_length=2000)
    """In the first message, where the server wants one."""
    start: Start | None = None
    """A new stream, in place of the one before."""
    prompt: Prompt | None = None
    """Of the stream, from its next chunk on."""
    shown: int | None = Field(default=None, ge=0)
    """Chunks that are on the screen, or were."""
    stop: bool = False
    """The stream ends."""
    save: bool = False
    """An mp4 of what was made is wanted."""


_TOLD = TypeAdapter(Told)


class ClosedError(Exception):
    """A viewer's connection is to be closed; one line that they are told.

    Args:
        code: of the websocket's close.
    """

    def __init__(self, why: object, code: int = 1008):
        super().__init__(one_line(why))
        self.code = code


def packed(head: dict[str, Any], parts: list[bytes]) -> bytes:
    """A head and bytes in one message."""
    text = json.dumps({**head, "lengths": [len(part) for part in parts]}).encode()
    return b"".join((struct.pack(">I", len(text)), text, *parts))


async def receive(socket: WebSocket) -> Told:
    """The next message.

    Raises:
        ClosedError: it is none.
        WebSocketDisconnect: the viewer has gone.
    """
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code") or 1005)
    text = message.get("text")
    if text is None or len(text) > MOST_MESSAGE_BYTES:
        raise ClosedError(f"message: it must be a text of at most {MOST_MESSAGE_BYTES} bytes")
    try:
        return checked_json(text, _TOLD)
    except ValueError as error:
        raise ClosedError(error) from error


async def send(socket: WebSocket, message: dict[str, Any] | bytes, seconds: float) -> None:
    """Send a note, or bytes.

    Args:
        seconds: that the viewer may take nothing.
    Raises:
        ClosedError: they took nothing for so long.
        WebSocketDisconnect: they have gone.
    """
    try:
        async with asyncio.timeout(seconds):
            if isinstance(message, bytes):
                await socket.send_bytes(message)
            else:
                await socket.send_text(json.dumps(message))
    except TimeoutError:
        raise ClosedError(f"nothing was taken for {seconds:g} s") from None
    except RuntimeError:  # uvicorn 0.54 and starlette 1.10: it is closing already
        raise WebSocketDisconnect(1006) from None


async def close(socket: WebSocket, error: ClosedError) -> None:
    """Say why and close; a reason has 123 bytes at most, so it is told before."""
    with suppress(RuntimeError, WebSocketDisconnect, TimeoutError):
        async with asyncio.timeout(_GOODBYE_SECONDS):
            await socket.send_text(json.dumps({"closed": str(error)}))
            await socket.close(error.code)
