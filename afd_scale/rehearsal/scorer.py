"""A server that stands in for a judge behind HTTP (docs/judges.md): scores that mean nothing, and never change."""

import json
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Scorer(BaseHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        """Nothing: BaseHTTPRequestHandler would write each request to stderr."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        scores = [zlib.crc32(json.dumps(video, sort_keys=True).encode()) / 2**32 for video in asked["videos"]]
        answer = json.dumps({"scores": scores}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


@contextmanager
def scorer() -> Iterator[str]:
    """A server on this machine, by its URL; closed at the end."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Scorer)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score"
    finally:
        server.shutdown()
        server.server_close()
