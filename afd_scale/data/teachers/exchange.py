"""Speaks to a video API: at its pace, again after a failure, without a word of the key."""

import hashlib
import json
import math
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import Any, TypeVar

import httpx

from afd_scale.codecs.codec import RejectedError
from afd_scale.config import ConfigError, one_line
from afd_scale.data.teachers.faults import Fault, fault_of, is_unpaid
from afd_scale.data.teachers.protocols import PROTOCOLS, Look, Request, said_in

T = TypeVar("T")

STUB = "stub"  # the url of a rehearsal
NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)
_LONGEST_BACKOFF_SECONDS = 60.0
_LONGEST_RETRY_AFTER_SECONDS = 900.0
_GONE = (400, 403, 404, 410)  # of a video, and 403 of a link that has expired
_NO_JSON = (ValueError, RecursionError)  # the second of what is nested too deeply
_MARKUP = re.compile(r"<(style|script)\b.*?</\1>|<[^>]*>", re.DOTALL)


@dataclass(frozen=True)
class Endpoint:
    """How a teacher is asked.

    Attributes:
        url, model: of the endpoint, such as http://teacher:8000/v1; STUB is a server of our own.
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

    def asks(self, prompt: str) -> str:
        """Names what is asked, but for the number of the video; that of a rehearsal begins with STUB."""
        what: tuple[object, ...] = (prompt, self.model, dict(self.request))
        if self.protocol != "openai":  # which journals without a protocol are of
            what = (*what, self.protocol)
        digest = hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=8).hexdigest()
        return f"{STUB}-{digest}" if self.url == STUB else digest


class StoppedError(Exception):
    """The job ends; what is under way goes on when it is started again."""


class NotHadError(Exception):
    """What was asked for cannot be had, now.

    Attributes:
        gone: nor later, as far as the server says.
    """

    def __init__(self, why: str, gone: bool = False):
        super().__init__(why)
        self.gone = gone


class AnswerError(Exception):
    """An answer that does not give what was asked for.

    Attributes:
        status: of HTTP.
        said: what went wrong, in the server's words; a page says nothing that could be understood.
        refuses: it is an error or a page, even if its status is a success.
        wait_seconds: before the next attempt, as the server asks.
        ours: it is the endpoint's, not of another server that a link leads to.
    """

    def __init__(self, response: httpx.Response, ours: bool):
        page = response.text.lstrip().startswith("<")
        try:
            answer = response.json()
            said = said_in(answer)
        except _NO_JSON:
            answer, said = None, "" if page else response.text
        self.said = one_line(said)
        self.refuses = not response.is_success or page or (isinstance(answer, dict) and bool(answer.get("error")))
        text = self.said or one_line(_MARKUP.sub(" ", response.text)) or response.reason_phrase
        what = " and names no video" if response.is_success else ""
        super().__init__(f"it answers {response.status_code}{what}: {text}")
        self.status, self.ours = response.status_code, ours
        asked_for = response.headers.get("retry-after", "")
        self.wait_seconds = float(asked_for) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", asked_for) else 0.0


class Exchange:
    """A client of one endpoint; threads may share it. The key is written nowhere; None is for servers without one."""

    def __init__(self, endpoint: Endpoint, key: str | None, url: str):
        """Args:
            url: where the endpoint is; its own, but for a stub.
        """  # fmt: skip
        self.endpoint, self.protocol, self._key = endpoint, PROTOCOLS[endpoint.protocol], key
        self._url = httpx.URL(url)
        # A connection kept open may break just as a request leaves; nobody could tell whether it arrived.
        self._client = httpx.Client(
            timeout=endpoint.exchange_seconds, limits=httpx.Limits(max_keepalive_connections=0),
            event_hooks={"request": [self._add_key]}, trust_env=endpoint.url != STUB,  # no proxy to this machine
        )  # fmt: skip
        self.stop = Event()
        self._pacing = Lock()
        self._next_request = 0.0

    def _add_key(self, request: httpx.Request) -> None:
        """Give the key to the endpoint alone, wherever links and redirects lead."""
        name, before = self.protocol.key_header
        request.headers.pop(name, None)
        if self._key and self._is_ours(request.url):
            request.headers[name] = f"{before}{self._key}"

    def _is_ours(self, url: httpx.URL) -> bool:
        return (url.scheme, url.host, url.port) == (self._url.scheme, self._url.host, self._url.port)

    def close(self) -> None:
        self._client.close()

    def create(self, request: Request, repeat: str) -> str:
        """Ask for a video, once; its id.

        Args:
            repeat: names the request, for servers that give the video of an earlier one again.
        Raises:
            AnswerError, httpx.HTTPError: what came is no video, or nothing came.
        """
        form = {name: (None, text) for name, text in (request.form or {}).items()}
        headers = {"Idempotency-Key": repeat}
        response = self._send("POST", request.path, json=request.json, files=form or None, headers=headers)
        try:
            video_id = self.protocol.id_of(response.json())
        except _NO_JSON:  # though it was accepted, perhaps
            video_id = None
        if video_id is None:
            raise AnswerError(response, ours=True)
        return video_id

    def look(self, video_id: str) -> Look:
        """How a video stands.

        Raises:
            AnswerError, httpx.HTTPError: see `download`.
            ValueError, KeyError, TypeError, AttributeError: the answer does not say.
        """
        return self.protocol.look(video_id, self.endpoint.model, lambda path: self._send("GET", path).json())

    def download(self, link: str) -> bytes:
        """What is behind a link, once.

        Raises:
            AnswerError, httpx.HTTPError: what came is no success, or nothing came.
        """
        return self._send("GET", link).content

    def _send(self, method: str, path: str, **body: Any) -> httpx.Response:
        url = path if path.startswith(("http://", "https://")) else f"{str(self._url).rstrip('/')}/{path}"
        response = self._client.request(method, url, follow_redirects=method == "GET", **body)
        if not response.is_success:
            raise AnswerError(response, self._is_ours(response.url))
        return response

    def patiently(self, exchange: Callable[[], T]) -> T:
        """What may be done again and again without harm.

        Raises:
            NotHadError: it cannot be had.
            RejectedError: the server says that the prompt is at fault.
            ConfigError: it does not answer, or the account is at fault.
        """
        problem: Exception | None = None
        for attempt in range(self.endpoint.attempts):
            self._back_off(attempt, problem)
            try:
                return exchange()
            except (ConfigError, RejectedError, StoppedError):
                raise
            except AnswerError as error:
                problem = error
                self._raise_what_stays(error)
            except Exception as error:  # a connection that breaks in the middle, an answer of some other kind
                problem = error
        assert problem is not None, "there is at least one attempt"
        failed = f"{self.endpoint.attempts} attempts failed, the last with {self.text(problem)}"
        if isinstance(problem, NEVER_SENT) and self._is_ours(problem.request.url):
            raise ConfigError(f"url ({self.endpoint.url}) must answer: {failed}; what was made stays, start again")
        raise NotHadError(failed, gone=isinstance(problem, NotHadError))  # what is there, again and again, is no video

    def _raise_what_stays(self, error: AnswerError) -> None:
        """Raise what an answer about one video means, unless another attempt may help."""
        fault = fault_of(error.status, error.said)
        # A key may see some videos and not others, and a link that leads elsewhere is that video's alone.
        of_all = error.status in (401, 402, 429) or is_unpaid(error.said)
        if error.ours and fault is Fault.ACCOUNT and of_all:
            raise self.account_at_fault(error) from None
        if error.ours and error.status == 422:  # a model's own answer to the prompt
            raise RejectedError(f"the teacher refused the prompt: {self.text(error)}") from None
        if fault in (Fault.ACCOUNT, Fault.PROMPT):
            raise NotHadError(self.text(error), gone=error.status in _GONE) from None

    def account_at_fault(self, said: object) -> ConfigError:
        return ConfigError(f"url ({self.endpoint.url}) must make videos by protocol {self.endpoint.protocol} with this "
                           f"key, account and model {self.endpoint.model}: {self.text(said)}; "
                           "the same command goes on with what is left to ask for")  # fmt: skip

    def pace(self) -> None:
        """Wait until another video may be asked for."""
        with self._pacing:
            begin = max(time.monotonic(), self._next_request)
            self._next_request = begin + 60.0 / (self.endpoint.requests_per_minute or math.inf)
        self.pause(begin - time.monotonic())

    def _back_off(self, attempt: int, problem: Exception | None) -> None:
        """Wait before an attempt that is not the first: longer each time, and at least as long as the server asks."""
        seconds = self.endpoint.backoff_seconds * 2 ** (attempt - 1) * random.uniform(0.5, 1.0) if attempt else 0.0
        seconds = min(seconds, _LONGEST_BACKOFF_SECONDS)
        if isinstance(problem, AnswerError):
            seconds = max(seconds, min(problem.wait_seconds, _LONGEST_RETRY_AFTER_SECONDS))
        self.pause(seconds)

    def pause(self, seconds: float) -> None:
        if self.stop.wait(max(0.0, seconds)):
            raise StoppedError

    def text(self, said: Any) -> str:
        """One short line without the key, whatever a server repeats of a request."""
        line = one_line(said)
        return (line.replace(self._key, "***") if self._key else line)[:300]


def _filled(value: Any, index: int) -> Any:
    if value == "{index}":
        return index
    return value.replace("{index}", str(index)) if isinstance(value, str) else value
