"""Google's long-running operations, Veo in the Gemini API. Videos are there for two days, behind the key."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from afd_scale.data.teachers.protocols.protocol import Look, Request, VideoProtocol, look_of, renamed, said_in

_NAMES = {"seconds": "durationSeconds", "resolution": "resolution", "ratio": "aspectRatio"}


class Google(VideoProtocol):
    url = "https://generativelanguage.googleapis.com/v1beta"
    key = "GEMINI_API_KEY"
    id_field = "name"

    def key_headers(self, key: str) -> dict[str, str]:
        return {"x-goog-api-key": key}

    def create(self, prompt: str, model: str, fields: Mapping[str, Any]) -> Request:
        body = {"instances": [{"prompt": prompt}], "parameters": renamed(fields, _NAMES)}
        return Request("POST", f"models/{model.removeprefix('models/')}:predictLongRunning", json=body)

    def look(self, video_id: str, model: str) -> Request:
        return Request("GET", quote(video_id))

    def read(self, video_id: str, model: str, answer: Any) -> Look:
        if "name" not in answer:
            raise KeyError("no operation")
        if not answer.get("done"):
            return Look()
        if answer.get("error"):
            return Look(end="failed", said=said_in(answer["error"]))
        response = answer["response"]["generateVideoResponse"]
        if response.get("raiMediaFilteredReasons"):
            return Look(end="filtered", said=said_in(response["raiMediaFilteredReasons"]))
        return look_of("done", (), "done", answer, response.get("generatedSamples"))
