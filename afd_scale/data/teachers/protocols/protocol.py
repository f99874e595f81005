"""What a video API must say of itself; the exchange sends it, and the collector decides what becomes of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar, Protocol

_SAYING = ("error", "errors", "detail", "title", "code", "type", "message", "msg", "reason", "error_type")


@dataclass(frozen=True)
class Request:
    """One HTTP request.

    Attributes:
        path: below the endpoint's url.
        json, form: its body, as JSON or as a multipart form of texts; None has none.
    """

    method: str
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
        then: tells more than this answer, and is to be sent at once.
    """

    link: str | None = None
    end: str | None = None
    said: str = ""
    then: Request | None = None


class VideoProtocol(Protocol):
    """An API that is asked for a video, looked at until it is finished, and downloaded from.

    Attributes:
        url: of the hosted service; None where everyone has a server of their own.
        key: environment variable of its key.
        id_field: of the answer to a request, names the video from now on.
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
        """The video's id; None where the answer is none of this protocol."""
        value = answer.get(self.id_field) if isinstance(answer, dict) else None
        return value if isinstance(value, str) and value else None

    def look(self, video_id: str, model: str) -> Request: ...

    def read(self, video_id: str, model: str, answer: Any) -> Look:
        """How the video stands.

        Raises:
            KeyError, TypeError: the answer does not say.
        """
        ...


def look_of(state: Any, running: tuple[str, ...], done: str, answer: Any, link: Any) -> Look:
    """A look at an API that has a word for each state.

    Args:
        answer: that says why, where the state is an end without a video.
        link: of a finished video, the first of which is taken; one that has none is an end without a video.
    """
    if not isinstance(state, str):
        raise KeyError("no state")
    if state.lower() in running:
        return Look()
    if state.lower() != done:
        return Look(end=state, said=said_in(answer))
    found = first_link(link)
    return Look(found) if found else Look(end=state, said="no link to a video is there")


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
        parts = (said_in(answer[name]) for name in _SAYING if answer.get(name))
        return ", ".join(dict.fromkeys(filter(None, parts)))
    return str(answer) if answer else ""


def renamed(fields: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Fields with the names of an API; a size of WxH pixels, where it has none, is its resolution and aspect ratio.

    Args:
        names: of seconds, size, seed, resolution and ratio where they differ from these.
    """
    fields = dict(fields)
    width, _, height = str(fields.get("size", "")).partition("x")
    if "resolution" in names and width.isdecimal() and height.isdecimal() and int(width) * int(height):
        del fields["size"]
        common = gcd(int(width), int(height))
        fields = {
            "resolution": f"{min(int(width), int(height))}p",
            "ratio": f"{int(width) // common}:{int(height) // common}",
            **fields,
        }
    return {names.get(name, name): value for name, value in fields.items()}
