"""A student behind a real server on a free port, and a viewer who speaks its websocket."""

import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

from afd_scale.generation.job import Job
from afd_scale.serving.door import Door
from afd_scale.serving.server import listen, server_of
from afd_scale.serving.studio import Studio
from afd_scale.serving.viewer import Limits


class SlowStudio(Studio):
    """Takes its time over each pass through the network.

    Attributes:
        seconds: that a pass takes, at least.
        chunks: that were made of streams.
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.seconds, self.chunks = 0.0, 0
        self.student.network.calls = SlowCalls(self, self.student.network.calls)

    def stream(self, *arguments: Any) -> Iterator[Any]:
        for frames in super().stream(*arguments):
            self.chunks += 1
            yield frames


class SlowCalls:
    """Passes of a slow studio."""

    def __init__(self, studio: SlowStudio, calls: Any):
        self.studio, self.calls = studio, calls

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        time.sleep(self.studio.seconds)
        return self.calls(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.calls, name)


def studio_of(source: Path, folder: Path, **options: Any) -> SlowStudio:
    return SlowStudio(Job(source=source, out=folder, **options), "toy")


@contextmanager
def live_server(
    studio: Studio, folder: Path, token: str | None = None, limits: Limits | None = None, **options: Any
) -> Iterator[str]:
    """Serve a studio; the server's http://127.0.0.1:PORT."""
    with listen("127.0.0.1", 0) as listening:
        settings = {"queue": 16, "longest_seconds": 5.0, "keeps": 8, **options}
        server = server_of(studio, folder, Door(token), limits or Limits(), **settings)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            until(lambda: server.started)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def until(holds: Callable[[], bool], seconds: float = 20.0) -> float:
    """Wait for something; the seconds that it took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, "it does not come"
        time.sleep(0.005)
    return time.monotonic() - began


class Watcher:
    """A viewer who says and hears what the page does.

    Attributes:
        notes: all that was told besides chunks.
        chunks: heads of all chunks, with their pictures as `parts`.
    """

    def __init__(self, url: str):
        self._open = ExitStack()
        where = url.replace("http", "ws", 1) + "/v1/stream"
        self.socket: ClientConnection = self._open.enter_context(connect(where, max_size=None))
        self.notes: list[dict[str, Any]] = []
        self.chunks: list[dict[str, Any]] = []

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._open.close()

    def tell(self, **message: Any) -> None:
        self.socket.send(json.dumps(message))

    def hear(self, seconds: float = 20.0) -> dict[str, Any]:
        """The next message; raises TimeoutError where none comes."""
        message = self.socket.recv(timeout=seconds)
        if isinstance(message, str):
            note: dict[str, Any] = json.loads(message)
            self.notes.append(note)
            return note
        (size,) = struct.unpack(">I", message[:4])
        head: dict[str, Any] = json.loads(message[4 : 4 + size])
        head["parts"], at = [], 4 + size
        for length in head["lengths"]:
            head["parts"].append(message[at : at + length])
            at += length
        assert at == len(message)
        if "chunk" in head:
            self.chunks.append(head)
        return head

    def hear_of(self, name: str, shows: bool = True) -> Any:
        """What the next message with this field says in it; chunks on the way are shown at once."""
        while True:
            message = self.hear()
            if shows and "chunk" in message:
                self.tell(shown=message["chunk"] + 1)
            if name in message:
                return message[name]
