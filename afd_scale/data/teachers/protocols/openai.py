"""OpenAI's videos: create, poll, content. vLLM-Omni and SGLang speak it; OpenAI's own ended in September 2026."""

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from afd_scale.data.teachers.protocols.protocol import Get, Look, Request, VideoProtocol, look_of


class OpenAI(VideoProtocol):
    url = None
    key = "OPENAI_API_KEY"

    def create(self, prompt: str, model: str, fields: Mapping[str, Any]) -> Request:
        form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
        return Request("videos", form={"prompt": prompt, "model": model, **form})

    def path(self, video_id: str, model: str) -> str:
        return f"videos/{quote(video_id, safe='')}"

    def read(self, answer: Any, path: str, get: Get) -> Look:
        return look_of(answer, f"{path}/content")
