"""Replicate's predictions. Files are there for an hour."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from afd_scale.data.teachers.protocols.protocol import Get, Look, Request, VideoProtocol, first_link, look_of, renamed


class Replicate(VideoProtocol):
    url = "https://api.replicate.com/v1"
    key = "REPLICATE_API_TOKEN"

    def create(self, prompt: str, model: str, fields: Mapping[str, Any]) -> Request:
        """`model` is owner/name, or owner/name:version for one that is not Replicate's own."""
        asked = {"input": {"prompt": prompt, **renamed(fields)}}
        if ":" in model:
            return Request("predictions", json={"version": model, **asked})
        return Request(f"models/{model}/predictions", json=asked)

    def path(self, video_id: str, model: str) -> str:
        return f"predictions/{quote(video_id, safe='')}"

    def read(self, answer: Any, path: str, get: Get) -> Look:
        output = answer.get("output")
        if isinstance(output, dict):
            output = output.get("video") or output
        return look_of(answer, first_link(output))
