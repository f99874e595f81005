"""Replicate's predictions. Files are there for an hour."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from afd_scale.data.teachers.protocols.protocol import Look, Request, VideoProtocol, look_of, renamed

_NAMES = {"seconds": "duration", "resolution": "resolution", "ratio": "aspect_ratio"}


class Replicate(VideoProtocol):
    url = "https://api.replicate.com/v1"
    key = "REPLICATE_API_TOKEN"

    def create(self, prompt: str, model: str, fields: Mapping[str, Any]) -> Request:
        """`model` is owner/name, or owner/name:version for one that is not Replicate's own."""
        asked = {"input": {"prompt": prompt, **renamed(fields, _NAMES)}}
        if ":" in model:
            return Request("POST", "predictions", json={"version": model, **asked})
        return Request("POST", f"models/{model}/predictions", json=asked)

    def look(self, video_id: str, model: str) -> Request:
        return Request("GET", f"predictions/{quote(video_id, safe='')}")

    def read(self, video_id: str, model: str, answer: Any) -> Look:
        output = answer.get("output")
        if isinstance(output, dict):
            output = output.get("video") or output
        return look_of(answer["status"], ("starting", "processing"), "succeeded", answer, output)
