"""The video APIs that a teacher may speak: what each is asked, and what it says of a video.

The exchange sends and receives, and the collector decides what becomes of it; nothing here does.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar, Protocol
from urllib.parse import quote

Get = Callable[[str], Any]  # the JSON at a path below the endpoint's url

_RUNNING = ("queued", "in_queue", "pending", "starting", "preprocessing", "processing", "in_progress", "running")
_DONE = ("completed", "succeeded", "success", "done")
NO_LINK = "no link to a video is there"
_SPACES = ("workflows", "comfy")  # of fal, come before an owner
_SAYING = re.compile(r"error|reason|message|msg|detail|^(code|type|title)$", re.IGNORECASE)


@dataclass(frozen=True)
class Request:
    """What asks for a video.

    Attributes:
        path: below the endpoint's url.
        json, form: the body, as JSON or as a multipart form of texts; the other is None.
    """

    path: str
    json: Mapping[str, Any] | None = None
    form: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Look:
    """How a video stands: it is on its way where there is neither a link nor an end.

    Attributes:
        link: where the finished video is, a path below the url or a whole URL.
        end: the server's word for an end without a video.
        said: why that is, as far as the server says.
    """

    link: str | None = None
    end: str | None = None
    said: str = ""


class VideoProtocol(Protocol):
    """An API that is asked for a video, looked at until it is finished, and downloaded from.

    Attributes:
        url: of the hosted service; None where everyone has a server of their own.
        key: environment variable of its key.
        key_header: name, and what comes before the key.
        id_field: of the answers, names the video.
        state: path of a video's state, with {app} and {id}.
    """

    url: ClassVar[str | None]
    key: ClassVar[str]
    key_header: ClassVar[tuple[str, str]] = ("Authorization", "Bearer ")
    id_field: ClassVar[str] = "id"
    state: ClassVar[str]

    def create(self, prompt: str, model: str, fields: Mapping[str, Any]) -> Request:
        """The request for a video; `fields` seconds, size and seed have the API's names in it, others their own."""
        ...

    def id_of(self, answer: Any) -> str | None:
        """The video's id; None where the answer names none."""
        value = answer.get(self.id_field) if isinstance(answer, dict) else None
        return str(value) if value and isinstance(value, str | int) else None

    def look(self, video_id: str, model: str, get: Get) -> Look:
        """How a video stands.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: the answer does not say, or is another video's.
        """
        parts = model.strip("/").split("/")
        app = "/".join(parts[: 3 if parts[0] in _SPACES else 2])  # what else a model's name has is left out
        path = self.state.format(app=app, id=quote(video_id))
        answer = get(path)
        if self.id_of(answer) not in (None, video_id):
            raise ValueError(f"the state of another video, {self.id_of(answer)}")
        return self.read(answer, path, get)

    def read(self, answer: Any, path: str, get: Get) -> Look:
        """How the video stands whose state is `answer`, at `path`."""
        ...


class OpenAI(VideoProtocol):
    """OpenAI's videos: create, poll, content. vLLM-Omni and SGLang speak it; OpenAI's own ended in September 2026."""

    url = None
    key = "OPENAI_API_KEY"
    state = "videos/{id}"

    def create(self, prompt: str, model: str, fields: Mapping[str, Any]) -> Request:
        form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
        return Request("videos", form={"prompt": prompt, "model": model, **form})

    def read(self, answer: Any, path: str, get: Get) -> Look:
        return _look_of(answer, f"{path}/content")


class Ark(VideoProtocol):
    """Volcengine's and BytePlus's Ark: Seedance. A link to a video lives for a day."""

    url = "https://ark.cn-beijing.volces.com/api/v3"
    key = "ARK_API_KEY"
    state = "contents/generations/tasks/{id}"

    def create(self, prompt: str, model: str, fields: Mapping[str, Any]) -> Request:
        body = {"model": model, "content": [{"type": "text", "text": prompt}], **_renamed(fields, ratio="ratio")}
        return Request("contents/generations/tasks", json=body)

    def read(self, answer: Any, path: str, get: Get) -> Look:
        return _look_of(answer, _first_link((answer.get("content") or {}).get("video_url")))


class Fal(VideoProtocol):
    """fal's queue: submit, status, result. The result of a request that failed is the model's own error."""

    url = "https://queue.fal.run"
    key = "FAL_KEY"
    key_header = ("Authorization", "Key ")
    id_field = "request_id"
    state = "{app}/requests/{id}/status"

    def create(self, prompt: str, model: str, fields: Mapping[str, Any]) -> Request:
        return Request(model.strip("/"), json={"prompt": prompt, **_renamed(fields)})

    def read(self, answer: Any, path: str, get: Get) -> Look:
        if _word(answer.get("status")) not in _DONE or said_in(answer):
            return _look_of(answer, None)
        result = get(path.removesuffix("/status"))
        link = _first_link([result.get(name) for name in ("video", "videos", "video_url")])
        return Look(link) if link else Look(end=answer["status"], said=said_in(result) or NO_LINK)


class Replicate(VideoProtocol):
    """Replicate's predictions. Files are there for an hour."""

    url = "https://api.replicate.com/v1"
    key = "REPLICATE_API_TOKEN"
    state = "predictions/{id}"

    def create(self, prompt: str, model: str, fields: Mapping[str, Any]) -> Request:
        """`model` is owner/name, or owner/name:version for one that is not Replicate's own."""
        asked = {"input": {"prompt": prompt, **_renamed(fields)}}
        if ":" in model:
            return Request("predictions", json={"version": model, **asked})
        return Request(f"models/{model}/predictions", json=asked)

    def read(self, answer: Any, path: str, get: Get) -> Look:
        output = answer.get("output")
        if isinstance(output, dict):
            output = output.get("video") or output
        return _look_of(answer, _first_link(output))


class Google(VideoProtocol):
    """Google's long-running operations, Veo in the Gemini API. Videos are there for two days, behind the key."""

    url = "https://generativelanguage.googleapis.com/v1beta"
    key = "GEMINI_API_KEY"
    key_header = ("x-goog-api-key", "")
    id_field = "name"
    state = "{id}"

    def create(self, prompt: str, model: str, fields: Mapping[str, Any]) -> Request:
        parameters = _renamed(fields, seconds="durationSeconds", ratio="aspectRatio")
        body = {"instances": [{"prompt": prompt}], "parameters": parameters}
        return Request(f"models/{model.removeprefix('models/')}:predictLongRunning", json=body)

    def read(self, answer: Any, path: str, get: Get) -> Look:
        if answer.get("error"):
            return Look(end="failed", said=said_in(answer["error"]))
        if "name" not in answer:
            raise KeyError("no operation")
        if not answer.get("done"):
            return Look()
        response = (answer.get("response") or {}).get("generateVideoResponse") or {}
        link = _first_link(response.get("generatedSamples"))
        return Look(link) if link else Look(end="done", said=said_in(response) or NO_LINK)


PROTOCOLS: dict[str, VideoProtocol] = {
    "openai": OpenAI(), "ark": Ark(), "fal": Fal(), "replicate": Replicate(), "google": Google()
}  # fmt: skip


def _word(state: Any) -> str:
    """A state, however it is spelt."""
    return re.sub(r"[\W_]+", "_", str(state).strip().lower())


def _look_of(answer: Any, link: str | None) -> Look:
    """A look at an API that has a word for each state, in `status`.

    Args:
        link: of the video, if it is finished; None is an end without a video then.
    """
    state, said = answer.get("status"), said_in(answer)
    if state is None and not ("status" in answer and answer.get("error")):
        raise KeyError(f"no status, {said}")
    if _word(state) in _RUNNING:
        return Look()
    if _word(state) not in _DONE:
        return Look(end=str(state or "failed"), said=said)
    return Look(link) if link else Look(end=str(state), said=said or NO_LINK)


def _first_link(value: Any) -> str | None:
    """The first URL in a text, or in lists and objects of them."""
    if isinstance(value, str):
        return value if value.startswith(("http://", "https://")) else None
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, map(_first_link, inside)), None)


def said_in(answer: Any) -> str:
    """What an answer says went wrong: text, code or message, wherever they are; nothing that repeats the prompt."""
    if isinstance(answer, list):
        return "; ".join(filter(None, map(said_in, answer)))
    if isinstance(answer, dict):
        parts = (said_in(value) for name, value in answer.items() if _SAYING.search(name))
        return ", ".join(dict.fromkeys(filter(None, parts)))
    return str(answer) if answer else ""


def _renamed(fields: Mapping[str, Any], seconds: str = "duration", ratio: str = "aspect_ratio") -> dict[str, Any]:
    """Fields with the names of an API; a size of WxH pixels becomes its resolution and aspect ratio."""
    named = dict(fields)
    if "seconds" in named:
        named[seconds] = named.pop("seconds")
    width, _, height = str(named.get("size", "")).partition("x")
    if width.isdecimal() and height.isdecimal() and int(width) * int(height):
        del named["size"]
        common = gcd(int(width), int(height))
        named.setdefault("resolution", f"{min(int(width), int(height))}p")
        named.setdefault(ratio, f"{int(width) // common}:{int(height) // common}")
    return named
