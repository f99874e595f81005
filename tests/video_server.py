"""A server of the OpenAI videos protocol that is slow, refuses, fails, hangs up and lies, as it is told."""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

PAGE = b"<html><body>Welcome</body></html>"


class VideoServer:
    """Serves one video for everything; `told` says what goes wrong, by prompt.

    Attributes:
        url: of the endpoint.
        told: prompt to a list of what its next requests meet: `429`, `500`, `400`, `401`, `drop` (before it is
            accepted), `vanish` (accepted, and then no answer), `accepted 500` (and then that answer), `slow` (accepted,
            answered after a second), `html`, `html as json`; then all is well.
        outcome: prompt to `failed`, `html`, `cut` (once), `cut unseen` (once, and no length told), `expired`, `no poll`
            (400 to every poll); else its video is completed and downloads.
        shows: how its list shows a prompt.
        page: videos of a page of its list; it honours `after`.
        created: how often a video was accepted, by prompt.
        repeats: Idempotency-Key of every request.
    """

    def __init__(self, video: bytes, polls: int = 1, lists: bool = True):
        self.video, self.polls, self.lists = video, polls, lists
        self.told: dict[str, list[str]] = {}
        self.outcome: dict[str, str] = {}
        self.shows: Callable[[str], str] = str
        self.page = 1000
        self.repeats: list[str] = []
        self.created: Counter[str] = Counter()
        self.bodies: list[str] = []
        self.create_times: list[float] = []
        self.keys: set[str] = set()
        self.most_at_once = 0
        self._videos: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: Any) -> None:
                pass

            def do_POST(self) -> None:
                server.create(self)

            def do_GET(self) -> None:
                server.get(self)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def add_earlier(self, number: str, prompt: str, seconds: float) -> None:
        """A video of another job, so many seconds ago."""
        self._videos[number] = {
            "id": number, "object": "video", "prompt": prompt, "created_at": int(time.time() - seconds), "polls": 9,
            "status": "failed", "model": "m", "progress": 0,
        }  # fmt: skip

    def create(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers["Content-Length"])).decode()
        found = re.search(r'name="prompt"\r\n\r\n(.*?)\r\n', body)
        assert found is not None, body
        prompt = found[1]
        with self._lock:
            self.bodies.append(body)
            self.create_times.append(time.monotonic())
            self.keys.add(request.headers["Authorization"])
            self.repeats.append(request.headers["Idempotency-Key"])
            told = self.told.get(prompt, [])
            fault = told.pop(0) if told else ""
            if fault in ("", "vanish", "accepted 500", "slow"):
                self.created[prompt] += 1
                number = f"video_{sum(self.created.values())}"
                self._videos[number] = {
                    "id": number, "object": "video", "prompt": prompt, "created_at": int(time.time()), "polls": 0,
                    "status": "queued", "model": "m", "progress": 0,
                }  # fmt: skip
                busy = sum(video["status"] != "completed" for video in self._videos.values())
                self.most_at_once = max(self.most_at_once, busy)
        if fault in ("drop", "vanish"):
            request.connection.close()
        elif fault == "html":
            _answer(request, 200, PAGE, "text/html")
        elif fault == "html as json":
            _answer(request, 200, PAGE)
        elif fault == "slow":
            time.sleep(1.0)
            with suppress(OSError):  # nobody waits any more
                _answer(request, 200, json.dumps(self._videos[number]).encode())
        elif fault:
            fault = fault.removeprefix("accepted ")
            text = json.dumps({"error": {"message": f"no {request.headers['Authorization']}"}}).encode()
            _answer(request, int(fault), text, "application/json", {"Retry-After": "0.2"} if fault == "429" else {})
        else:
            _answer(request, 200, json.dumps(self._videos[number]).encode())

    def get(self, request: BaseHTTPRequestHandler) -> None:
        path, _, query = request.path.partition("?")
        after = parse_qs(query).get("after", [""])[0]
        path = path.removeprefix("/v1/videos").strip("/")
        if not path:
            if not self.lists:
                return _answer(request, 404, b"{}")
            videos = [{**video, "prompt": self.shows(video["prompt"])} for video in self._videos.values()]
            begin = [video["id"] for video in videos].index(after) + 1 if after else 0
            rest = videos[begin + self.page :]
            listed = {"object": "list", "data": videos[begin : begin + self.page], "has_more": bool(rest)}
            return _answer(request, 200, json.dumps(listed).encode())
        if path.partition("/")[0] not in self._videos:
            return _answer(request, 404, b"{}")
        video = self._videos[path.partition("/")[0]]
        outcome = self.outcome.get(video["prompt"], "")
        if path.endswith("/content"):
            return self._content(request, video["prompt"], outcome)
        if outcome == "no poll":
            return _answer(request, 400, b'{"error": {"message": "not now"}}')
        with self._lock:
            video["polls"] += 1
            if video["polls"] > self.polls:
                video["status"] = "failed" if outcome == "failed" else "completed"
                video["error"] = {"code": "policy", "message": "against the rules"} if outcome == "failed" else None
        return _answer(request, 200, json.dumps(video).encode())

    def _content(self, request: BaseHTTPRequestHandler, prompt: str, outcome: str) -> None:
        if outcome == "html":
            _answer(request, 200, PAGE, "text/html")
        elif outcome == "expired":
            _answer(request, 404, b"{}")
        elif outcome in ("cut", "cut unseen"):
            self.outcome[prompt] = ""
            _answer(request, 200, self.video, "video/mp4", cut=True, length=outcome == "cut")
        else:
            _answer(request, 200, self.video, "video/mp4")


def _answer(
    request: BaseHTTPRequestHandler, status: int, body: bytes, kind: str = "application/json",
    headers: dict[str, str] | None = None, cut: bool = False, length: bool = True,
) -> None:  # fmt: skip
    request.send_response(status)
    told = {"Content-Length": str(len(body))} if length else {"Connection": "close"}
    for name, value in {"Content-Type": kind, **told, **(headers or {})}.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body[: len(body) // 2] if cut else body)
    if cut:
        request.wfile.flush()
        request.connection.close()
