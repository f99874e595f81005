"""fal's queue: submit, status, result. The result of a request that failed is the model's own error."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from afd_scale.data.teachers.protocols.protocol import Look, Request, VideoProtocol, look_of, renamed, said_in

_NAMES = {"seconds": "duration", "resolution": "resolution", "ratio": "aspect_ratio"}
_SPACES = ("workflows", "comfy")  # come before an owner


class Fal(VideoProtocol):
    url = "https://queue.fal.run"
    key = "FAL_KEY"
    id_field = "request_id"

    def key_headers(self, key: str) -> dict[str, str]:
        return {"Authorization": f"Key {key}"}

    def create(self, prompt: str, model: str, fields: Mapping[str, Any]) -> Request:
        return Request("POST", model.strip("/"), json={"prompt": prompt, **renamed(fields, _NAMES)})

    def look(self, video_id: str, model: str) -> Request:
        return Request("GET", f"{self._request(video_id, model)}/status")

    def read(self, video_id: str, model: str, answer: Any) -> Look:
        links = [answer.get(name) for name in ("video", "videos", "video_url")]
        if any(links):
            return look_of("completed", (), "completed", answer, links)
        if answer["status"] == "COMPLETED" and not said_in(answer):
            return Look(then=Request("GET", self._request(video_id, model)))
        return look_of(answer["status"], ("in_queue", "in_progress"), "", answer, None)

    def _request(self, video_id: str, model: str) -> str:
        """Below the owner and the app; what else a model's name has is left out there."""
        parts = model.strip("/").split("/")
        return "/".join([*parts[: 3 if parts[0] in _SPACES else 2], "requests", quote(video_id, safe="")])
