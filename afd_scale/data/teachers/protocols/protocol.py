"""What a video API must say of itself; the exchange sends it, and the collector decides what becomes of it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar, Protocol

Get = Callable[[str], Any]  # the JSON at a path below the endpoint's url

_RUNNING = ("queued", "in_queue", "pending", "starting", "preprocessing", "processing", "in_progress", "running")
DONE = ("completed", "succeeded", "success", "done")
NO_LINK = "no link to a video is there"
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
        id_field: of the answers, names the video.
    """

    url: ClassVar[str | None]
    key: ClassVar[str]
    id_field: ClassVar[str] = "id"

    def key_headers(self, key: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {key}"}

    def create(self, prompt: str, model: str, fields: Mapping[str, Any]) -> Request:
        """The request for a video; `fields` seconds, size and seed have the API's names in it, others their own."""
        ...

    def id_of(self, answer: Any) -> str | None:
        """The video's id; None where the answer names none."""
        value = answer.get(self.id_field) if isinstance(answer, dict) else None
        return str(value) if value and isinstance(value, str | int) else None

    def path(self, video_id: str, model: str) -> str:
        """Where a video's state is."""
        ...

    def look(self, video_id: str, model: str, get: Get) -> Look:
        """How a video stands.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: the answer does not say, or is another video's.
        """
        path = self.path(video_id, model)
        answer = get(path)
        if self.id_of(answer) not in (None, video_id):
            raise ValueError(f"the state of another video, {self.id_of(answer)}")
        return self.read(answer, path, get)

    def read(self, answer: Any, path: str, get: Get) -> Look:
        """How the video stands whose state is `answer`, at `path`."""
        ...


def word(state: Any) -> str:
    """A state, however it is spelt."""
    return re.sub(r"[\W_]+", "_", str(state).strip().lower())


def look_of(answer: Any, link: str | None) -> Look:
    """A look at an API that has a word for each state, in `status`.

    Args:
        link: of the video, if it is finished; None is an end without a video then.
    """
    state, said = answer.get("status"), said_in(answer)
    if state is None and not answer.get("error"):
        raise KeyError("no status")
    if word(state) in _RUNNING:
        return Look()
    if word(state) not in DONE:
        return Look(end=str(state or "failed"), said=said)
    return Look(link) if link else Look(end=str(state), said=said or NO_LINK)


def first_link(value: Any) -> str | None:
    """The first URL in a text, or in lists and objects of them."""
    if isinstance(value, str):
        return value if value.startswith(("http://", "https://")) else None
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, map(first_link, inside)), None)


def said_in(answer: Any) -> str:
    """What an answer says went wrong: text, code or message, wherever they are; nothing that repeats the prompt."""
    if isinstance(answer, list):
        return "; ".join(filter(None, map(said_in, answer)))
    if isinstance(answer, dict):
        parts = (said_in(value) for name, value in answer.items() if _SAYING.search(name))
        return ", ".join(dict.fromkeys(filter(None, parts)))
    return str(answer) if answer else ""


def renamed(
    fields: Mapping[str, Any], seconds: str = "duration", resolution: str = "resolution", ratio: str = "aspect_ratio"
) -> dict[str, Any]:
    """Fields with the names of an API; a size of WxH pixels becomes its resolution and aspect ratio."""
    named = dict(fields)
    if "seconds" in named:
        named[seconds] = named.pop("seconds")
    width, _, height = str(named.get("size", "")).partition("x")
    if width.isdecimal() and height.isdecimal() and int(width) * int(height):
        del named["size"]
        common = gcd(int(width), int(height))
        named.setdefault(resolution, f"{min(int(width), int(height))}p")
        named.setdefault(ratio, f"{int(width) // common}:{int(height) // common}")
    return named
