"""A server of each video API that is slow, refuses, fails, hangs up and lies, as it is told."""

import json
import re
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PAGE = b"<html><body>Welcome</body></html>"
ACCEPTED = ("", "vanish", "accepted 500", "slow")


class VideoServer:
    """Serves one video for everything; `told` says what goes wrong, by prompt.

    Attributes:
        url: of the endpoint.
        told: prompt to a list of what its next requests meet: a status, or (status, body); `drop` (before it is
            accepted), `vanish` (accepted, and then no answer), `accepted 500` (and then that answer), `slow` (accepted,
            answered after a second), `html`, `html as json`; then all is well.
        outcome: prompt to `failed`, `html`, `cut` (once), `cut unseen` (once, and no length told), `expired` (its link
            is dead), `no poll` (400 to every poll), `state NAME` (it ends in that), `nothing` (finished without a
            video); else its video is completed and downloads.
        finishes: the number of videos that may; the others are on their way.
        elsewhere: origin of the links to videos; None is this server.
        created: how often a video was accepted, by prompt.
        repeats: Idempotency-Key of every request.
        bodies: of every request for a video, as text.
        keys, keys_elsewhere: that came with requests to this server by its url, and by `elsewhere`; None for none.
        paths: that were asked for, with ID for a video's.
    """

    def __init__(self, video: bytes, polls: int = 1, protocol: str = "openai"):
        self.video, self.polls, self.protocol = video, polls, DIALECTS[protocol]
        self.finishes = 1 << 30
        self.told: dict[str, list[Any]] = {}
        self.outcome: dict[str, str] = {}
        self.elsewhere: str | None = None
        self.repeats: list[str] = []
        self.created: Counter[str] = Counter()
        self.bodies: list[str] = []
        self.create_times: list[float] = []
        self.keys: set[str | None] = set()
        self.keys_elsewhere: set[str | None] = set()
        self.paths: set[str] = set()
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
        self.origin = f"http://127.0.0.1:{self._http.server_port}"
        self.url = f"{self.origin}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def create(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers["Content-Length"])).decode()
        path = request.path.removeprefix("/v1/")
        assert path == self.protocol.create_path, path
        prompt = self.protocol.prompt(body)
        with self._lock:
            self.bodies.append(body)
            self.create_times.append(time.monotonic())
            self.keys.add(request.headers[self.protocol.key_header])
            self.repeats.append(request.headers["Idempotency-Key"])
            told = self.told.get(prompt, [])
            fault = told.pop(0) if told else ""
            if fault in ACCEPTED:
                self.created[prompt] += 1
                number = f"video_{sum(self.created.values())}"
                self._videos[number] = {"id": number, "prompt": prompt, "polls": 0, "over": False}
                self.most_at_once = max(self.most_at_once, sum(not video["over"] for video in self._videos.values()))
        if fault in ("drop", "vanish"):
            request.connection.close()
        elif fault == "html":
            _answer(request, 200, PAGE, "text/html")
        elif fault == "html as json":
            _answer(request, 200, PAGE)
        elif fault in ("", "slow"):
            time.sleep(1.0 if fault else 0.0)
            with suppress(OSError):  # nobody waits any more
                _answer(request, self.protocol.created_status, _json(self.protocol.created(number)))
        elif isinstance(fault, tuple):
            _answer(request, fault[0], _json(fault[1]))
        else:
            status = int(fault.removeprefix("accepted "))
            said = {"error": {"message": f"no {request.headers[self.protocol.key_header]}"}}
            _answer(request, status, _json(said), headers={"Retry-After": "0.2"} if status == 429 else {})

    def get(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.removeprefix("/v1/")
        found = re.search(r"video_\d+", path)
        video = self._videos.get(found[0]) if found else None
        here = request.headers["Host"] in self.origin
        with self._lock:
            self.paths.add(re.sub(r"video_\d+", "ID", path))
            (self.keys if here else self.keys_elsewhere).add(request.headers[self.protocol.key_header])
        if video is None:
            return _answer(request, 404, b"{}")
        outcome = self.outcome.get(video["prompt"], "")
        content = self.protocol.content_path.replace("ID", video["id"])
        if path == content or path.startswith("linked/"):
            return self._content(request, video["prompt"], outcome)
        if outcome == "no poll":
            return _answer(request, 400, b'{"error": {"message": "not now"}}')
        with self._lock:
            video["polls"] += 1
            video["over"] = video["polls"] > self.polls and int(video["id"][6:]) <= self.finishes
        link = f"{self.elsewhere or self.origin}/v1/{content}"
        status, answer = self.protocol.look(path, video["id"], video["over"], outcome, link)
        return _answer(request, status, _json(answer))

    def _content(self, request: BaseHTTPRequestHandler, prompt: str, outcome: str) -> None:
        if outcome == "html":
            _answer(request, 200, PAGE, "text/html")
        elif outcome == "expired":
            _answer(request, 403, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>",
                    "application/xml")  # fmt: skip
        elif outcome in ("cut", "cut unseen"):
            self.outcome[prompt] = ""
            _answer(request, 200, self.video, "video/mp4", cut=True, length=outcome == "cut")
        else:
            _answer(request, 200, self.video, "video/mp4")


class _OpenAI:
    key_header, key_form = "Authorization", "Bearer {}"
    create_path, content_path, created_status, model = "videos", "videos/ID/content", 200, "m"
    look_paths = {"videos/ID"}

    def prompt(self, body: str) -> str:
        found = re.search(r'name="prompt"\r\n\r\n(.*?)\r\n', body)
        assert found is not None, body
        return found[1]

    def created(self, number: str) -> dict[str, Any]:
        return {"id": number, "object": "video", "status": "queued", "model": "m", "progress": 0}

    def look(self, path: str, number: str, over: bool, outcome: str, link: str) -> tuple[int, dict[str, Any]]:
        state = _state(over, outcome, "in_progress", "completed", "failed")
        error = {"code": "policy", "message": "against the rules"} if over and outcome == "failed" else None
        return 200, {"id": number, "object": "video", "status": state, "error": error}


class _Ark:
    key_header, key_form = "Authorization", "Bearer {}"
    create_path, created_status, model = "contents/generations/tasks", 200, "doubao-seedance-1-0-pro-250528"
    content_path, look_paths = "linked/ID.mp4", {"contents/generations/tasks/ID"}

    def prompt(self, body: str) -> str:
        asked = json.loads(body)
        assert asked["model"] == self.model
        assert asked["content"][0]["type"] == "text"
        return str(asked["content"][0]["text"])

    def created(self, number: str) -> dict[str, Any]:
        return {"id": number}

    def look(self, path: str, number: str, over: bool, outcome: str, link: str) -> tuple[int, dict[str, Any]]:
        task: dict[str, Any] = {"id": number, "model": self.model}
        task["status"] = _state(over, outcome, "running", "succeeded", "failed")
        if task["status"] == "succeeded":
            task["content"] = {} if outcome == "nothing" else {"video_url": link}
        elif task["status"] == "failed":
            task["error"] = {"code": "OutputVideoSensitiveContentDetected", "message": "against the rules"}
        return 200, task


class _Fal:
    key_header, key_form = "Authorization", "Key {}"
    create_path, created_status, model = "fal-ai/veo3/fast", 200, "fal-ai/veo3/fast"
    content_path = "linked/ID.mp4"
    look_paths = {"fal-ai/veo3/requests/ID/status", "fal-ai/veo3/requests/ID"}

    def prompt(self, body: str) -> str:
        return str(json.loads(body)["prompt"])

    def created(self, number: str) -> dict[str, Any]:
        base = f"https://queue.fal.run/fal-ai/veo3/requests/{number}"
        return {"request_id": number, "status": "IN_QUEUE", "response_url": base, "status_url": f"{base}/status"}

    def look(self, path: str, number: str, over: bool, outcome: str, link: str) -> tuple[int, dict[str, Any]]:
        if path.endswith("/status"):
            state = _state(over, "" if outcome == "failed" else outcome, "IN_PROGRESS", "COMPLETED", "")
            return 200 if over else 202, {"status": state, "request_id": number, "response_url": "x", "logs": None}
        if outcome == "failed":
            told = {"loc": ["body", "prompt"], "msg": "against the rules", "type": "content_policy_violation"}
            return 422, {"detail": [told]}
        return 200, {"seed": 1} if outcome == "nothing" else {"video": {"url": link, "content_type": "video/mp4"}}


class _Replicate:
    key_header, key_form = "Authorization", "Bearer {}"
    create_path, created_status, model = "models/wan/t2v/predictions", 201, "wan/t2v"
    content_path, look_paths = "linked/ID.mp4", {"predictions/ID"}

    def prompt(self, body: str) -> str:
        return str(json.loads(body)["input"]["prompt"])

    def created(self, number: str) -> dict[str, Any]:
        return {"id": number, "status": "starting", "output": None, "error": None, "urls": {"get": "https://x"}}

    def look(self, path: str, number: str, over: bool, outcome: str, link: str) -> tuple[int, dict[str, Any]]:
        state = _state(over, outcome, "processing", "succeeded", "failed")
        output = link if state == "succeeded" and outcome != "nothing" else None
        error = "against the rules (E005)" if state == "failed" else None
        return 200, {"id": number, "status": state, "output": output, "error": error, "logs": "frame 1"}


class _Google:
    key_header, key_form = "x-goog-api-key", "{}"
    create_path, created_status, model = "models/veo-3:predictLongRunning", 200, "veo-3"
    content_path, look_paths = "files/ID:download?alt=media", {"models/veo-3/operations/ID"}

    def prompt(self, body: str) -> str:
        asked = json.loads(body)
        assert set(asked) == {"instances", "parameters"}
        return str(asked["instances"][0]["prompt"])

    def created(self, number: str) -> dict[str, Any]:
        return {"name": f"models/veo-3/operations/{number}"}

    def look(self, path: str, number: str, over: bool, outcome: str, link: str) -> tuple[int, dict[str, Any]]:
        operation: dict[str, Any] = self.created(number)
        if not over:
            return 200, operation
        if outcome.startswith("state "):
            return 200, {**operation, "done": True, "error": {"code": 1, "message": outcome[6:]}}
        if outcome == "failed":
            response: dict[str, Any] = {"raiMediaFilteredCount": 1, "raiMediaFilteredReasons": ["against the rules"]}
        else:
            response = {"generatedSamples": [] if outcome == "nothing" else [{"video": {"uri": link}}]}
        return 200, {**operation, "done": True, "response": {"generateVideoResponse": response}}


DIALECTS: dict[str, Any] = {
    "openai": _OpenAI(), "ark": _Ark(), "fal": _Fal(), "replicate": _Replicate(), "google": _Google()
}  # fmt: skip


def _state(over: bool, outcome: str, running: str, done: str, failed: str) -> str:
    if not over:
        return running
    return {"failed": failed}.get(outcome, outcome[6:] if outcome.startswith("state ") else done)


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


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
