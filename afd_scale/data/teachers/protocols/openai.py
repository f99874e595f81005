"""OpenAI's videos: create, poll, content. vLLM-Omni and SGLang speak it too."""

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from afd_scale.data.teachers.protocols.protocol import Look, Request, VideoProtocol, look_of

_RUNNING = ("queued", "pending", "in_progress", "processing", "running")  # and those of compatible servers


class OpenAI(VideoProtocol):
    url = None
    key = "OPENAI_API_KEY"

    def create(self, prompt: str, model: str, fields: Mapping[str, Any]) -> Request:
        form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
        return Request("POST", "videos", form={"prompt": prompt, "model": model, **form})

    def look(self, video_id: str, model: str) -> Request:
        return Request("GET", f"videos/{quote(video_id, safe='')}")

    def read(self, video_id: str, model: str, answer: Any) -> Look:
        if answer["status"] == "completed":
            return Look(f"videos/{quote(video_id, safe='')}/content")
        return look_of(answer["status"], _RUNNING, "completed", answer, None)
