"""fal's queue: submit, status, result. The result of a request that failed is the model's own error."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from afd_scale.data.teachers.protocols.protocol import (
    DONE,
    NO_LINK,
    Get,
    Look,
    Request,
    VideoProtocol,
    first_link,
    look_of,
    renamed,
    said_in,
    word,
)

_SPACES = ("workflows", "comfy")  # come before an owner


class Fal(VideoProtocol):
    url = "https://queue.fal.run"
    key = "FAL_KEY"
    id_field = "request_id"

    def key_headers(self, key: str) -> dict[str, str]:
        return {"Authorization": f"Key {key}"}

    def create(self, prompt: str, model: str, fields: Mapping[str, Any]) -> Request:
        return Request(model.strip("/"), json={"prompt": prompt, **renamed(fields)})

    def path(self, video_id: str, model: str) -> str:
        """Below the owner and the app; what else a model's name has is left out there."""
        parts = model.strip("/").split("/")
        app = "/".join(parts[: 3 if parts[0] in _SPACES else 2])
        return f"{app}/requests/{quote(video_id, safe='')}/status"

    def read(self, answer: Any, path: str, get: Get) -> Look:
        if word(answer.get("status")) not in DONE or said_in(answer):
            return look_of(answer, None)
        result = get(path.removesuffix("/status"))
        link = first_link([result.get(name) for name in ("video", "videos", "video_url")])
        return Look(link) if link else Look(end=answer["status"], said=said_in(result) or NO_LINK)
