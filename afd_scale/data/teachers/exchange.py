"""Speaks to an OpenAI-compatible videos endpoint: at its pace, again after a failure, without a word of the key."""

import math
import random
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from threading import Event, Lock
from typing import Any, TypeVar

from afd_scale.codecs.codec import RejectedError
from afd_scale.config import ConfigError, one_line

T = TypeVar("T")

_LONGEST_BACKOFF_SECONDS = 60.0
_LONGEST_RETRY_AFTER_SECONDS = 900.0
_PAGE = 100  # videos of a page of the server's list
AGAIN = (408, 409, 425, 429)  # and 5xx: another attempt may help


@dataclass(frozen=True)
class Endpoint:
    """How a teacher is asked.

    Attributes:
        url, model: of the endpoint, such as http://teacher:8000/v1.
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


class StoppedError(Exception):
    """The job ends; what is under way goes on when it is started again."""


class NotHadError(Exception):
    """The server will not give what was asked for."""


class Exchange:
    """A client of one endpoint; threads may share it. The key is written nowhere; None is for servers without one."""

    def __init__(self, endpoint: Endpoint, key: str | None):
        import openai

        # OpenAI closed its own video model in 2026 and marked these calls as deprecated (3.54); others speak them.
        warnings.filterwarnings("ignore", "The Sora API", DeprecationWarning)
        self.failures = (openai.APIStatusError, openai.APIConnectionError)
        self._status_error = openai.APIStatusError
        self.videos = openai.OpenAI(
            base_url=endpoint.url, api_key=key or "none", max_retries=0, timeout=endpoint.exchange_seconds
        ).videos
        self.endpoint, self._key = endpoint, key
        self.stop = Event()
        self._pacing = Lock()
        self._next_request = 0.0

    def listed(self) -> list[Any]:
        """Every video of the server: id, prompt and, if it says, created_at by its clock.

        Raises:
            ValueError: its list is cut off, or shows no prompts.
            NotHadError, ConfigError: see `patiently`.
        """
        found: dict[str, Any] = {}
        after: dict[str, Any] = {}
        while True:
            page: Any = self.patiently(partial(self.videos.list, limit=_PAGE, **after))
            new = [video for video in page.data if video.id not in found]
            if not all(isinstance(video.prompt, str) for video in new):
                raise ValueError("its videos have no prompt")
            found |= {video.id: video for video in new}
            more = page.has_more if page.has_more is not None else len(page.data) >= _PAGE
            if not more:
                return list(found.values())
            if not new:
                raise ValueError("its list does not go on")
            after = {"after": page.last_id or page.data[-1].id}

    def patiently(self, exchange: Callable[[], T]) -> T:
        """What may be done again and again without harm.

        Raises:
            NotHadError: the server will not give it.
            ConfigError: it does not answer, or refuses the key.
        """
        problem: Exception | None = None
        for attempt in range(self.endpoint.attempts):
            self.back_off(attempt, problem)
            try:
                return exchange()
            except self._status_error as error:
                problem, status = error, error.status_code
                answer = f"it answers {status}, {self.text(error)}"
                if status in (401, 403):
                    raise ConfigError(f"url ({self.endpoint.url}) must take this key: {answer}") from None
                if (status < 500 or status == 501) and status not in AGAIN:  # 501 is not implemented
                    raise NotHadError(f"the server must still have the teacher's video: {answer}") from None
            except ConfigError:
                raise
            except Exception as error:  # a connection that breaks in the middle has an error of the layer below
                problem = error
        assert problem is not None, "there is at least one attempt"
        if isinstance(problem, RejectedError):
            raise NotHadError(f"the teacher's file cannot be used, it {problem}")
        raise self.gave_up(problem)

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
        if isinstance(problem, self._status_error):
            asked_for = problem.response.headers.get("retry-after", "")
            if asked_for.replace(".", "", 1).isdigit():
                seconds = max(seconds, min(float(asked_for), _LONGEST_RETRY_AFTER_SECONDS))
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


def folded(prompt: str) -> str:
    """A prompt as servers may show it: blanks and case aside."""
    return " ".join(prompt.split()).casefold()
