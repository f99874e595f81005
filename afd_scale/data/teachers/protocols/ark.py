"""Volcengine's and BytePlus's Ark, contents/generations/tasks: Seedance. A link to a video lives for a day."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from afd_scale.data.teachers.protocols.protocol import Get, Look, Request, VideoProtocol, first_link, look_of, renamed

_TASKS = "contents/generations/tasks"


class Ark(VideoProtocol):
    url = "https://ark.cn-beijing.volces.com/api/v3"
    key = "ARK_API_KEY"

    def create(self, prompt: str, model: str, fields: Mapping[str, Any]) -> Request:
        content = [{"type": "text", "text": prompt}]
        return Request(_TASKS, json={"model": model, "content": content, **renamed(fields, ratio="ratio")})

    def path(self, video_id: str, model: str) -> str:
        return f"{_TASKS}/{quote(video_id, safe='')}"

    def read(self, answer: Any, path: str, get: Get) -> Look:
        return look_of(answer, first_link((answer.get("content") or {}).get("video_url")))
