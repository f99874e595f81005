"""Google's long-running operations, Veo in the Gemini API. Videos are there for two days, behind the key."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from afd_scale.data.teachers.protocols.protocol import (
    NO_LINK,
    Get,
    Look,
    Request,
    VideoProtocol,
    first_link,
    renamed,
    said_in,
)


class Google(VideoProtocol):
    url = "https://generativelanguage.googleapis.com/v1beta"
    key = "GEMINI_API_KEY"
    id_field = "name"

    def key_headers(self, key: str) -> dict[str, str]:
        return {"x-goog-api-key": key}

    def create(self, prompt: str, model: str, fields: Mapping[str, Any]) -> Request:
        parameters = renamed(fields, seconds="durationSeconds", ratio="aspectRatio")
        body = {"instances": [{"prompt": prompt}], "parameters": parameters}
        return Request(f"models/{model.removeprefix('models/')}:predictLongRunning", json=body)

    def path(self, video_id: str, model: str) -> str:
        return quote(video_id)

    def read(self, answer: Any, path: str, get: Get) -> Look:
        if answer.get("error"):
            return Look(end="failed", said=said_in(answer["error"]))
        if "name" not in answer:
            raise KeyError("no operation")
        if not answer.get("done"):
            return Look()
        response = (answer.get("response") or {}).get("generateVideoResponse") or {}
        link = first_link(response.get("generatedSamples"))
        return Look(link) if link else Look(end="done", said=said_in(response) or NO_LINK)
