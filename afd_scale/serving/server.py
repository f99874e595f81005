"""Runs the app on a socket."""

import asyncio
import socket
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from afd_scale.config import ConfigError
from afd_scale.serving.app import App
from afd_scale.serving.door import Door
from afd_scale.serving.line import Line
from afd_scale.serving.messages import MOST_MESSAGE_BYTES
from afd_scale.serving.shelf import Shelf
from afd_scale.serving.studio import Studio
from afd_scale.serving.viewer import Limits

_MOST_CONNECTIONS = 256  # beyond viewers and clients that are served; more get 503
_MOST_SILENT = 64  # of them that ask for nothing
_PING_SECONDS = 10.0  # a viewer who is gone without a word is seen after twice as long


class _Connection(H11Protocol):
    """One of which the oldest that asks for nothing goes when there are many: they would keep the others out."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.since = self.loop.time()
        silent = [other for other in self.connections if isinstance(other, _Connection) and other.is_silent]
        if len(silent) > _MOST_SILENT:
            min(silent, key=lambda other: other.since).transport.close()

    @property
    def is_silent(self) -> bool:
        """Whether no request is whole, or the last one is answered."""
        return not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete)


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 takes a free one.

    Raises:
        ConfigError: nothing can listen there.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"host, port ({host}, {port}) must be an address to listen at: {reason}") from error
    return listening


def server_of(
    studio: Studio, folder: Path, door: Door, limits: Limits, *, queue: int, longest_seconds: float, keeps: int
) -> uvicorn.Server:
    """A server that is ready to run; it ends with SIGINT and SIGTERM, and the worker with it.

    Args:
        folder: of finished videos.
        queue: turns that may wait.
        longest_seconds, keeps: of the videos API, see `Shelf`.
    """
    line = Line(queue)
    shelf = Shelf(studio, line, folder, longest_seconds=longest_seconds, keeps=keeps)
    app = App(studio, line, shelf, door, limits)
    config = uvicorn.Config(
        app.starlette(), http=_Connection, ws="websockets-sansio", loop="asyncio", lifespan="on", log_config=None,
        access_log=False, server_header=False, proxy_headers=False, limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=5, ws_max_size=MOST_MESSAGE_BYTES, ws_max_queue=8, ws_ping_interval=_PING_SECONDS,
        ws_ping_timeout=_PING_SECONDS, ws_per_message_deflate=False,
    )  # fmt: skip
    return uvicorn.Server(config)
