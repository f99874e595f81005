"""A server that scores videos, and fails in every way it is told to."""

import base64
import io
import json
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import av
import numpy as np

PAGE = b"<html><body>\nWelcome to the cluster, " + b"dear user " * 20 + b"</body></html>"


def score(video: dict[str, Any]) -> float:
    """Of what a request says: depends on every part of it."""
    with av.open(io.BytesIO(base64.b64decode(video["mp4"]))) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return float(frames.astype(float).std() + zlib.crc32(video["prompt"].encode()) % 97 + video["fps"])


class JudgeServer:
    """Scores videos; `told` says what goes wrong.

    Attributes:
        url: for requests.
        told: by the number of a request, the first being 0: `hang`, `drip` (a byte at a time, for ever), `html`, `nan`,
            `words`, `short` (a score too few), `drop`, or a status; else all is well.
        asked: what requests said.
        keys: of them all.
        most_at_once: requests at any time.
    """

    def __init__(self) -> None:
        self.told: dict[int, str] = {}
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.most_at_once = self._now = 0
        self.closing = threading.Event()
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: Any) -> None:
                pass

            def do_POST(self) -> None:
                with suppress(OSError):  # nobody waits any more
                    server.answer(self)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/score"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        asked = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        with self._lock:
            fault = self.told.get(len(self.asked), "")
            self.asked.append(asked)
            self.keys.add(request.headers["Authorization"])
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        scores: list[Any] = [score(video) for video in asked["videos"]]
        time.sleep(0.02)  # so that those at once meet
        with self._lock:
            self._now -= 1
        if fault == "hang":
            self.closing.wait()
        elif fault == "drop":
            request.connection.close()
        elif fault.isdigit():
            _send(request, int(fault), f"no, {request.headers['Authorization']}".encode())
        elif fault == "html":
            _send(request, 200, PAGE)
        elif fault == "echo":
            _send(request, 200, ("." * 66 + request.headers["Authorization"]).encode())
        elif fault == "cut":
            request.send_response(200)
            request.send_header("Content-Length", "40")
            request.end_headers()
            request.wfile.write(b'{"scores": [1.0')
            request.wfile.flush()
            request.connection.close()
        elif fault == "drip":
            self._drip(request)
        else:
            if fault == "nan":
                scores[-1] = float("nan")
            if fault == "words":
                scores[0] = "good"
            _send(request, 200, json.dumps({"scores": scores[1:] if fault == "short" else scores}).encode())

    def _drip(self, request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        while not self.closing.wait(0.05):
            request.wfile.write(b" ")
            request.wfile.flush()


@contextmanager
def judge_server() -> Iterator[JudgeServer]:
    """One, closed at the end."""
    server = JudgeServer()
    try:
        yield server
    finally:
        server.close()


def _send(request: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    request.send_response(status)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)
