"""Speaks to a video API: at its pace, again after a failure, without a word of the key."""

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import Any, TypeVar

import httpx

from afd_scale.codecs.codec import RejectedError
from afd_scale.config import ConfigError, one_line
from afd_scale.data.teachers.faults import Fault, fault_of, is_unpaid
from afd_scale.data.teachers.protocols import PROTOCOLS
from afd_scale.data.teachers.protocols.protocol import Look, Request, said_in

T = TypeVar("T")

NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)
_LONGEST_BACKOFF_SECONDS = 60.0
_LONGEST_RETRY_AFTER_SECONDS = 900.0


@dataclass(frozen=True)
class Endpoint:
    """How a teacher is asked.

    Attributes:
        url, model: of the endpoint, such as http://teacher:8000/v1.
        protocol: that it speaks, one of PROTOCOLS.
        request: further fields of a request; "{index}" in a text is the number of the video among those of its prompt.
        concurrency: videos asked for at once.
        requests_per_minute: for new videos; None does not wait.
        price: of a video.
        budget: that all videos of the folder together may cost; None does not count.
        poll_seconds, backoff_seconds: between looks at a video, and before the second attempt.
        timeout_seconds, exchange_seconds: for a video from asking to finished, and for one request and its answer.
        attempts: at any one exchange.
        ask_again: ask again for what was refused, and for what may have been paid for and lost.
    """

    url: str
    model: str
    protocol: str = "openai"
    request: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 4
    requests_per_minute: float | None = None
    price: float = 0.0
    budget: float | None = None
    poll_seconds: float = 5.0
    backoff_seconds: float = 1.0
    timeout_seconds: float = 1800.0
    exchange_seconds: float = 60.0
    attempts: int = 12
    ask_again: bool = False

    def create(self, prompt: str, index: int) -> Request:
        """The request for one video of a prompt."""
        fields = {name: _filled(value, index) for name, value in self.request.items()}
        return PROTOCOLS[self.protocol].create(prompt, self.model, fields)


class StoppedError(Exception):
    """The job ends; what is under way goes on when it is started again."""


class NotHadError(Exception):
    """The server will not give what was asked for."""


class AnswerError(Exception):
    """An answer that is no success.

    Attributes:
        status: of HTTP.
        wait_seconds: before the next attempt, as the server asks.
        ours: it is the endpoint's, not of another server that a link leads to.
    """

    def __init__(self, response: httpx.Response, ours: bool):
        try:
            said = said_in(response.json())
        except ValueError:
            said = ""
        super().__init__(said or one_line(response.text) or response.reason_phrase)
        self.status, self.ours = response.status_code, ours
        asked_for = response.headers.get("retry-after", "")
        self.wait_seconds = float(asked_for) if asked_for.replace(".", "", 1).isdigit() else 0.0


class Exchange:
    """A client of one endpoint; threads may share it. The key is written nowhere; None is for servers without one."""

    def __init__(self, endpoint: Endpoint, key: str | None):
        self.endpoint, self.protocol, self._key = endpoint, PROTOCOLS[endpoint.protocol], key
        self._url = httpx.URL(endpoint.url)
        # A connection kept open may break just as a request leaves; nobody could tell whether it arrived.
        self._client = httpx.Client(
            timeout=endpoint.exchange_seconds, limits=httpx.Limits(max_keepalive_connections=0),
            event_hooks={"request": [self._add_key]},
        )  # fmt: skip
        self.stop = Event()
        self._pacing = Lock()
        self._next_request = 0.0

    def _add_key(self, request: httpx.Request) -> None:
        """Give the key to the endpoint alone, wherever links and redirects lead."""
        for name, value in self.protocol.key_headers(self._key or "").items():
            request.headers.pop(name, None)
            if self._key and self._is_ours(request.url):
                request.headers[name] = value

    def _is_ours(self, url: httpx.URL) -> bool:
        return (url.scheme, url.host, url.port) == (self._url.scheme, self._url.host, self._url.port)

    def close(self) -> None:
        self._client.close()

    def send(self, request: Request, headers: Mapping[str, str] | None = None) -> httpx.Response:
        """Send once.

        Raises:
            AnswerError, httpx.HTTPError: what came is no success, or nothing came.
        """
        link = request.path.startswith(("http://", "https://"))
        response = self._client.request(
            request.method, request.path if link else f"{self.endpoint.url.rstrip('/')}/{request.path}",
            json=request.json, files=request.form and {name: (None, text) for name, text in request.form.items()},
            headers=headers, follow_redirects=request.method == "GET",
        )  # fmt: skip
        if not response.is_success:
            raise AnswerError(response, self._is_ours(response.url))
        return response

    def look(self, video_id: str) -> Look:
        """How a video stands.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: the answer does not say.
            AnswerError, httpx.HTTPError: see `send`.
        """
        request = self.protocol.look(video_id, self.endpoint.model)
        look = self.protocol.read(video_id, self.endpoint.model, self.send(request).json())
        if look.then is not None:
            look = self.protocol.read(video_id, self.endpoint.model, self.send(look.then).json())
            if look.then is not None:
                raise ValueError("its result is none")
        return look

    def patiently(self, exchange: Callable[[], T]) -> T:
        """What may be done again and again without harm.

        Raises:
            NotHadError: the server will not give it.
            RejectedError: it says that the prompt is at fault.
            ConfigError: it does not answer, or the account is at fault.
        """
        problem: Exception | None = None
        for attempt in range(self.endpoint.attempts):
            self.back_off(attempt, problem)
            try:
                return exchange()
            except AnswerError as error:
                problem = error
                self._raise_what_stays(error)
            except ConfigError:
                raise
            except Exception as error:  # a connection that breaks in the middle, an answer of some other kind
                problem = error
        assert problem is not None, "there is at least one attempt"
        if isinstance(problem, RejectedError):
            raise NotHadError(f"the teacher's file cannot be used, it {problem}")
        if isinstance(problem, NEVER_SENT) and self._is_ours(problem.request.url):
            raise self.gave_up(problem)
        raise NotHadError(f"the server must give the teacher's video: {self.endpoint.attempts} attempts failed, "
                          f"the last with {self.text(problem)}")  # fmt: skip

    def _raise_what_stays(self, error: AnswerError) -> None:
        """Raise what an answer about one video means, unless another attempt may help."""
        fault, answer = fault_of(error.status, str(error)), f"it answers {error.status}, {self.text(error)}"
        # A key may see some videos and not others, and a link that leads elsewhere is that video's alone.
        of_all = error.status in (401, 402, 429) or is_unpaid(str(error))
        if error.ours and fault is Fault.ACCOUNT and of_all:
            raise ConfigError(f"url ({self.endpoint.url}) must take this key and account: {answer}") from None
        if error.ours and error.status == 422:  # a model's own answer to the prompt
            raise RejectedError(f"the teacher refused the prompt: {self.text(error)}") from None
        if fault in (Fault.ACCOUNT, Fault.PROMPT) or error.status == 501:  # 501 is not implemented
            raise NotHadError(f"the server must still have the teacher's video: {answer}") from None

    def pace(self) -> None:
        """Wait until another video may be asked for."""
        with self._pacing:
            begin = max(time.monotonic(), self._next_request)
            self._next_request = begin + 60.0 / (self.endpoint.requests_per_minute or math.inf)
        self.pause(begin - time.monotonic())

    def back_off(self, attempt: int, problem: Exception | None) -> None:
        """Wait before an attempt that is not the first: longer each time, and at least as long as the server asks."""
        seconds = self.endpoint.backoff_seconds * 2 ** (attempt - 1) * random.uniform(0.5, 1.0) if attempt else 0.0
        seconds = min(seconds, _LONGEST_BACKOFF_SECONDS)
        if isinstance(problem, AnswerError):
            seconds = max(seconds, min(problem.wait_seconds, _LONGEST_RETRY_AFTER_SECONDS))
        self.pause(seconds)

    def pause(self, seconds: float) -> None:
        if self.stop.wait(max(0.0, seconds)):
            raise StoppedError

    def gave_up(self, problem: Exception) -> ConfigError:
        return ConfigError(f"url ({self.endpoint.url}) must answer: {self.endpoint.attempts} attempts failed, "
                           f"the last with {self.text(problem)}; what was made stays, start again")  # fmt: skip

    def text(self, said: Any) -> str:
        """One short line without the key, whatever a server repeats of a request."""
        line = one_line(said)
        return (line.replace(self._key, "***") if self._key else line)[:300]


def _filled(value: Any, index: int) -> Any:
    if value == "{index}":
        return index
    return value.replace("{index}", str(index)) if isinstance(value, str) else value
