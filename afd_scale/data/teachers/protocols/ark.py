"""Volcengine's and BytePlus's Ark, contents/generations/tasks: Seedance. A link to a video lives for a day."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from afd_scale.data.teachers.protocols.protocol import Look, Request, VideoProtocol, look_of, renamed

_TASKS = "contents/generations/tasks"
_NAMES = {"seconds": "duration", "resolution": "resolution", "ratio": "ratio"}


class Ark(VideoProtocol):
    url = "https://ark.cn-beijing.volces.com/api/v3"
    key = "ARK_API_KEY"

    def create(self, prompt: str, model: str, fields: Mapping[str, Any]) -> Request:
        content = [{"type": "text", "text": prompt}]
        return Request("POST", _TASKS, json={"model": model, "content": content, **renamed(fields, _NAMES)})

    def look(self, video_id: str, model: str) -> Request:
        return Request("GET", f"{_TASKS}/{quote(video_id, safe='')}")

    def read(self, video_id: str, model: str, answer: Any) -> Look:
        link = (answer.get("content") or {}).get("video_url")
        return look_of(answer["status"], ("queued", "running"), "succeeded", answer, link)
