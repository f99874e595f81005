"""A server of each video API that is slow, refuses, fails, hangs up and lies, as it is told."""

import re
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import Any

from afd_scale.data.teachers.protocols import PROTOCOLS
from afd_scale.data.teachers.stub import Stub, answer

PAGE = b"<html><head><style>p {a: b}</style></head><body>Welcome</body></html>"
EXPIRED = b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"
ACCEPTED = ("", "vanish", "accepted 500", "slow")
# Protocol to a model, and where it is asked and looked at, with ID for a video's.
SPOKEN: dict[str, tuple[str, str, set[str]]] = {
    "openai": ("m", "videos", {"videos/ID"}),
    "ark": ("doubao-seedance-1-0-pro-250528", "contents/generations/tasks", {"contents/generations/tasks/ID"}),
    "fal": ("fal-ai/veo3/fast", "fal-ai/veo3/fast",
            {"fal-ai/veo3/requests/ID/status", "fal-ai/veo3/requests/ID"}),
    "replicate": ("wan/t2v", "models/wan/t2v/predictions", {"predictions/ID"}),
    "google": ("veo-3", "models/veo-3:predictLongRunning", {"models/veo-3/operations/ID"}),
}  # fmt: skip


class VideoServer(Stub):
    """Serves one video for everything; `told` says what goes wrong, by prompt.

    Attributes:
        told: prompt to a list of what its next requests meet: a status, or (status, body); `drop` (before it is
            accepted), `vanish` (accepted, and then no answer), `accepted 500` (and then that answer), `slow` (accepted,
            answered after five seconds), `html`, `html as json`; then all is well.
        outcome: prompt to `failed`, `html`, `json`, `empty`, `cut` (once), `cut unseen` (once, and no length told),
            `down` (502), `expired` (its link is dead), `moved` (to `elsewhere`, where it is expired), `no poll` (400 to
            every poll), `state NAME` (it ends in that), `nothing` (finished without a video); or (status, body), which
            every poll is answered with; else its video is completed and downloads.
        finishes: the number of videos that may; the others are on their way.
        elsewhere: origin of the links to videos; None is this server.
        created: how often a video was accepted, by prompt.
        repeats: Idempotency-Key of every request.
        bodies: of every request for a video, as text.
        keys, keys_elsewhere: that came with requests to this server by its url, and by `elsewhere`; None for none.
        paths: that were asked for, with ID for a video's.
    """

    def __init__(self, video: bytes, polls: int = 1, protocol: str = "openai"):
        self.video, self.polls, self.protocol = video, polls, protocol
        self.key_header = PROTOCOLS[protocol].key_header[0]
        self.finishes = 1 << 30
        self.told: dict[str, list[Any]] = {}
        self.outcome: dict[str, Any] = {}
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
        super().__init__(protocol)

    def create(self, request: BaseHTTPRequestHandler) -> None:
        body, path = request.rfile.read(int(request.headers["Content-Length"])), request.path.removeprefix("/v1/")
        assert path == SPOKEN[self.protocol][1], path
        prompt = self.dialect.asked(body)["prompt"]
        with self._lock:
            self.bodies.append(body.decode())
            self.create_times.append(time.monotonic())
            self.keys.add(request.headers[self.key_header])
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
        elif fault in ("html", "html as json"):
            answer(request, 200, PAGE, "text/html" if fault == "html" else "application/json")
        elif fault in ("", "slow"):
            time.sleep(5.0 if fault else 0.0)
            with suppress(OSError):  # nobody waits any more
                answer(request, self.dialect.created_status, self.dialect.created(number, path))
        elif isinstance(fault, tuple):
            answer(request, *fault)
        else:
            status = int(fault.removeprefix("accepted "))
            said = {"error": {"message": f"no {request.headers[self.key_header]}"}}
            answer(request, status, said, **({"Retry-After": "0.2"} if status == 429 else {}))

    def get(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.removeprefix("/v1/")
        found = re.search(r"video_\d+", path)
        video = self._videos.get(found[0]) if found else None
        here = request.headers["Host"] in self.origin
        with self._lock:
            self.paths.add(re.sub(r"video_\d+", "ID", path))
            (self.keys if here else self.keys_elsewhere).add(request.headers[self.key_header])
        if video is None:
            return answer(request, 404, {})
        outcome = self.outcome.get(video["prompt"], "")
        content = self.dialect.content.replace("ID", video["id"])
        if path == content:
            if outcome == "moved" and here:
                return answer(request, 302, b"", Location=f"{self.elsewhere}{request.path}")
            return self._content(request, video["prompt"], outcome)
        if outcome == "no poll":
            outcome = (400, {"error": {"message": "not now"}})
        if isinstance(outcome, tuple):
            return answer(request, *outcome)
        with self._lock:
            video["polls"] += 1
            video["over"] = video["polls"] > self.polls and int(video["id"][6:]) <= self.finishes
        link = f"{self.elsewhere or self.origin}/v1/{content}"
        status, said = self.dialect.look(path, video["id"], video["over"], link)
        if video["over"] and outcome:
            status, said = _ended(self.protocol, path, status, said, outcome)
        return answer(request, status, said)

    def _content(self, request: BaseHTTPRequestHandler, prompt: str, outcome: str) -> None:
        if outcome in ("cut", "cut unseen"):
            self.outcome[prompt] = ""
            length = str(len(self.video)) if outcome == "cut" else ""
            request.send_response(200)
            request.send_header(*(("Content-Length", length) if length else ("Connection", "close")))
            request.end_headers()
            request.wfile.write(self.video[: len(self.video) // 2])
            request.wfile.flush()
            return request.connection.close()
        files: dict[str, tuple[Any, ...]] = {
            "html": (200, PAGE, "text/html"),
            "json": (200, {"status": "processing"}),
            "empty": (200, b"", "video/mp4"),
            "expired": (403, EXPIRED, "application/xml"),
            "moved": (403, EXPIRED, "application/xml"),
            "down": (502, PAGE, "text/html"),
        }
        return answer(request, *files.get(outcome, (200, self.video, "application/octet-stream")))


def _ended(protocol: str, path: str, status: int, said: dict[str, Any], outcome: str) -> tuple[int, dict[str, Any]]:
    """What a server says of a video that is over, by its outcome."""
    state = outcome.removeprefix("state ") if outcome.startswith("state ") else None
    rules = "against the rules"
    if protocol == "google":
        if state:
            return status, {"name": said["name"], "done": True, "error": {"code": 1, "message": state}}
        samples = {"failed": {"raiMediaFilteredCount": 1, "raiMediaFilteredReasons": [rules]}, "nothing": {}}
        response = samples.get(outcome, said["response"]["generateVideoResponse"])
        return status, {"name": said["name"], "done": True, "response": {"generateVideoResponse": response}}
    if protocol == "fal":
        if state:
            return status, {**said, "status": state}
        if path.endswith("/status") or outcome not in ("failed", "nothing"):
            return status, said
        told = {"loc": ["body", "prompt"], "msg": rules, "type": "content_policy_violation"}
        return (422, {"detail": [told]}) if outcome == "failed" else (200, {"seed": 1})
    if state or outcome == "failed":
        errors = {"openai": {"code": "policy", "message": rules},
                  "ark": {"code": "OutputVideoSensitiveContentDetected", "message": rules},
                  "replicate": f"{rules} (E005)"}  # fmt: skip
        return status, {"id": said["id"], "status": state or "failed", "error": None if state else errors[protocol]}
    return status, {**said, "output": None, "content": None} if outcome == "nothing" else said
