"""A rehearsal: a server of each video API on this machine, which costs nothing.

It answers as the API is documented, with small clips of the toy world. Its ids say all that there is to know of a
video, so one that is started later knows it, too.
"""

import hashlib
import json
import re
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

import numpy as np

from afd_scale.data.worlds.drop import ToyPrompt, render_clips
from afd_scale.mp4 import mp4_bytes

_FPS = 8
_SECONDS = 5  # of a video that no length is asked for
_ENLARGED = 8  # times the toy world's 16 pixels
_ID = re.compile(r"stub_(\d+)_(\d+)_(\d+)_(\d+)_\w+")  # when it is finished, its prompt's number, its seed, its seconds


class Dialect(Protocol):
    """What a server of one API says.

    Attributes:
        creates: matches the path of a request for a video.
        created_status: of HTTP, where it is accepted.
        content: path of a finished video, whose id is ID there.
    """

    creates: str
    created_status: int = 200
    content: str = "files/ID.mp4"

    def asked(self, body: bytes) -> dict[str, Any]:
        """The fields of a request, with its `prompt`."""
        asked: dict[str, Any] = json.loads(body)
        return asked

    def created(self, video_id: str, path: str) -> dict[str, Any]:
        """The answer to a request at `path`."""
        return {"id": video_id}

    def look(self, path: str, video_id: str, over: bool, link: str) -> tuple[int, dict[str, Any]]:
        """Status and answer where a video's state, or its result, is asked for; `link` is where a finished one is."""
        ...


class _OpenAI(Dialect):
    creates, content = "videos", "videos/ID/content"

    def asked(self, body: bytes) -> dict[str, Any]:
        return dict(re.findall(r'name="([^"]+)"\r\n\r\n(.*?)\r\n--', body.decode(), re.DOTALL))

    def created(self, video_id: str, path: str) -> dict[str, Any]:
        return {"id": video_id, "object": "video", "status": "queued", "progress": 0}

    def look(self, path: str, video_id: str, over: bool, link: str) -> tuple[int, dict[str, Any]]:
        state = "completed" if over else "in_progress"
        return 200, {"id": video_id, "object": "video", "status": state, "error": None}


class _Ark(Dialect):
    creates = "contents/generations/tasks"

    def asked(self, body: bytes) -> dict[str, Any]:
        asked = json.loads(body)
        return {**asked, "prompt": asked["content"][0]["text"]}

    def look(self, path: str, video_id: str, over: bool, link: str) -> tuple[int, dict[str, Any]]:
        if over:
            return 200, {"id": video_id, "status": "succeeded", "content": {"video_url": link}}
        return 200, {"id": video_id, "status": "running"}


class _Fal(Dialect):
    creates = r".+"

    def created(self, video_id: str, path: str) -> dict[str, Any]:
        base = f"https://queue.fal.run/{path}/requests/{video_id}"
        return {"request_id": video_id, "status": "IN_QUEUE", "response_url": base, "status_url": f"{base}/status"}

    def look(self, path: str, video_id: str, over: bool, link: str) -> tuple[int, dict[str, Any]]:
        if path.endswith("/status"):
            state = "COMPLETED" if over else "IN_PROGRESS"
            return 200 if over else 202, {"status": state, "request_id": video_id, "logs": None}
        return 200, {"video": {"url": link, "content_type": "video/mp4"}}


class _Replicate(Dialect):
    creates, created_status = r"models/.+/predictions|predictions", 201

    def asked(self, body: bytes) -> dict[str, Any]:
        return dict(json.loads(body)["input"])

    def created(self, video_id: str, path: str) -> dict[str, Any]:
        return {"id": video_id, "status": "starting", "output": None, "error": None}

    def look(self, path: str, video_id: str, over: bool, link: str) -> tuple[int, dict[str, Any]]:
        state, output = ("succeeded", link) if over else ("processing", None)
        return 200, {"id": video_id, "status": state, "output": output, "error": None, "logs": "frame 1"}


class _Google(Dialect):
    creates, content = r"models/.+:predictLongRunning", "files/ID:download?alt=media"

    def asked(self, body: bytes) -> dict[str, Any]:
        asked = json.loads(body)
        return {**asked["parameters"], **asked["instances"][0]}

    def created(self, video_id: str, path: str) -> dict[str, Any]:
        return {"name": f"{path.removesuffix(':predictLongRunning')}/operations/{video_id}"}

    def look(self, path: str, video_id: str, over: bool, link: str) -> tuple[int, dict[str, Any]]:
        if not over:
            return 200, {"name": path}
        videos = {"generatedSamples": [{"video": {"uri": link}}]}
        return 200, {"name": path, "done": True, "response": {"generateVideoResponse": videos}}


DIALECTS: dict[str, Dialect] = {
    "openai": _OpenAI(), "ark": _Ark(), "fal": _Fal(), "replicate": _Replicate(), "google": _Google()
}  # fmt: skip


class Stub:
    """A server of one protocol, on a port that is free, until it is closed.

    Attributes:
        url: of the endpoint.
        asked: prompt of every request, in their order.
    """

    def __init__(self, protocol: str, seconds: float = 3.0):
        """Args:
            seconds: that a video takes.
        """  # fmt: skip
        self.dialect, self.seconds = DIALECTS[protocol], seconds
        self.asked: list[str] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: Any) -> None:
                pass

            def do_POST(self) -> None:
                stub.create(self)

            def do_GET(self) -> None:
                stub.get(self)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.origin = f"http://127.0.0.1:{self._http.server_port}"
        self.url = f"{self.origin}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def create(self, request: BaseHTTPRequestHandler) -> None:
        """Accept what is asked."""
        body, path = request.rfile.read(int(request.headers["Content-Length"])), request.path.removeprefix("/v1/")
        if not re.fullmatch(self.dialect.creates, path):
            return answer(request, 404, {"error": {"message": f"{path} is no place to ask for videos"}})
        asked = self.dialect.asked(body)
        self.asked.append(asked["prompt"])
        return answer(request, self.dialect.created_status, self.dialect.created(self._id(asked), path))

    def _id(self, asked: dict[str, Any]) -> str:
        sentences = [prompt.sentence for prompt in ToyPrompt.every()]
        drawn = hashlib.blake2b(f"{asked['prompt']}\n{asked.get('seed')}".encode(), digest_size=4).digest()
        seed = int.from_bytes(drawn)
        number = sentences.index(asked["prompt"]) if asked["prompt"] in sentences else seed % len(sentences)
        length = next((asked[name] for name in ("seconds", "duration", "durationSeconds") if name in asked), _SECONDS)
        seconds = re.match(r"\d{1,2}", str(length))  # some say "8s"
        finished = time.time_ns() // 1_000_000 + round(1000 * self.seconds)
        return f"stub_{finished}_{number}_{seed}_{seconds[0] if seconds else _SECONDS}_{uuid.uuid4().hex[:8]}"

    def get(self, request: BaseHTTPRequestHandler) -> None:
        """Say how a video stands, or give it."""
        path = request.path.removeprefix("/v1/")
        found = _ID.search(path)
        if found is None:
            return answer(request, 404, {"error": {"message": "there is no such video"}})
        finished, number, seed, seconds = map(int, found.groups())
        content = self.dialect.content.replace("ID", found[0])
        if path == content:
            return answer(request, 200, _clip(number, seed, seconds), "video/mp4")
        over = time.time_ns() // 1_000_000 >= finished
        return answer(request, *self.dialect.look(path, found[0], over, f"{self.url}/{content}"))


def answer(request: BaseHTTPRequestHandler, status: int, body: bytes | Any, kind: str = "application/json",
           **headers: str) -> None:  # fmt: skip
    """Answer a request, with JSON of what is no bytes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request.send_response(status)
    for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(content)


def _clip(number: int, seed: int, seconds: int) -> bytes:
    """A clip of the toy world, forwards and backwards; a frame more than its seconds have, as teachers give them."""
    frames = render_clips([ToyPrompt.every()[number]], seed=seed)[0]
    there_and_back = np.concatenate([frames, frames[-2:0:-1]])
    shown = there_and_back[np.arange(seconds * _FPS + 1) % len(there_and_back)]
    return mp4_bytes(shown.repeat(_ENLARGED, axis=1).repeat(_ENLARGED, axis=2), _FPS)
