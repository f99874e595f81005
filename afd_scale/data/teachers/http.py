"""A teacher behind an OpenAI-compatible videos endpoint: create, poll, download.

Videos and a journal stay in a folder, so that nothing is asked or paid for twice: not after a crash, not after Ctrl-C,
and not when shards are made again in another form.
"""

import json
import logging
import os
import random
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from afd_scale.config import ConfigError
from afd_scale.data.clips import Clip, Frames, Reject, RejectedError, VideoForm
from afd_scale.data.teachers.journal import ASKED, ASKING, HAVE, LOST, NOT_MADE, REFUSED, Asked, Journal
from afd_scale.data.teachers.prompts import PromptRow, read_prompts
from afd_scale.data.video import read_video

log = logging.getLogger(__name__)

T = TypeVar("T")

LISTED = "prompts.jsonl"  # of the videos in the folder
_NEVER_SENT = ("ConnectError", "ConnectTimeout")  # of httpx, whichever package of that family openai is built on
_NO_LONGER_THAN_SECONDS = 60.0  # between attempts
_CLOCKS_APART_SECONDS = 60.0  # the server's and ours
_STOP = (401, 403, 404, 405)  # to a request for a video: the next one would be answered alike
_AGAIN = (408, 409, 425, 429)
_UNCLEAR = (408, 409, 502, 504, 520, 522, 524)  # a proxy gave up, and what is behind it may go on


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
        timeout_seconds: for a video from asking to finished.
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
    attempts: int = 12
    ask_again: bool = False


@dataclass(frozen=True)
class Request:
    """One video of a prompt."""

    row: PromptRow
    index: int

    @property
    def asked(self) -> Asked:
        return self.row.prompt_id, self.index

    @property
    def video(self) -> str:
        return f"{self.row.prompt_id}-{self.index}.mp4"


class _StoppedError(Exception):
    """The job ends; this request goes on when it is started again."""


class HttpTeacher:
    """Videos of an endpoint, kept in a folder with a journal. `collect` asks for them; the rest needs no network."""

    clips_at_once = 64

    def __init__(
        self, endpoint: Endpoint, prompts: Path, folder: Path, *, videos_per_prompt: int = 1, key: str | None = None,
        name: str | None = None,
    ):  # fmt: skip
        """Args:
            prompts: see `read_prompts`.
            folder: of videos and journal; made where it is not there.
            key: of the endpoint; it is written nowhere. None is for servers that want none.
            name: of the teacher; None takes the model's.
        """  # fmt: skip
        self.endpoint, self.prompts, self.folder = endpoint, prompts, folder
        self.videos_per_prompt, self._key = videos_per_prompt, key
        self.name = name or f"http:{endpoint.model}"
        self.provenance: dict[str, Any] = {
            "name": "http", "url": endpoint.url, "model": endpoint.model, "request": dict(endpoint.request)
        }  # fmt: skip

    def collect(self, on_video: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Ask for every video that the folder lacks, and download it; on one process.

        Args:
            on_video: called with the number of requests that are settled, and of all.
        Raises:
            ConfigError: the endpoint cannot be used, the budget is spent, or another process collects into the folder.
        """
        requests = [request for request in self._requests() if isinstance(request, Request)]
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(f"source ({self.folder}) must be filled by one process at a time: another one is at it"
                              ) from None  # fmt: skip
        try:
            _Collector(self.endpoint, self.folder, self._key).collect(requests, on_video)
        finally:
            self._list_videos()
            lock.release()

    def _list_videos(self) -> None:
        """Prompts of what is there, as the folder teacher reads them."""
        rows = [{"video": clip.video, "prompt": clip.prompt, "prompt_id": clip.prompt_id}
                for clip in self.clips() if isinstance(clip, Clip)]  # fmt: skip
        partial = self.folder / f".{LISTED}.partial"
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        partial.replace(self.folder / LISTED)

    def clips(self) -> list[Clip | Reject]:
        journal = Journal(self.folder / "journal.jsonl")
        clips: list[Clip | Reject] = []
        for request in self._requests():
            if isinstance(request, Reject):
                clips.append(request)
            elif journal.last(request.asked).get("state") == HAVE:
                clips.append(Clip(request.video, request.row.prompt, *request.asked))
            else:
                reason = journal.last(request.asked).get("reason", "there is no video yet; the same command asks again")
                clips.append(Reject(request.video, request.row.prompt, reason))
        return clips

    def frames(self, clip: Clip, form: VideoForm) -> Frames:
        return read_video(self.folder / clip.video, form)

    def _requests(self) -> list[Request | Reject]:
        """A prompt's videos follow one another."""
        seen: set[str] = set()
        requests: list[Request | Reject] = []
        for row in read_prompts(self.prompts):
            if isinstance(row, PromptRow) and row.prompt_id in seen:
                requests.append(Reject(row.prompt_id, row.prompt, "prompt must occur once: an earlier row has it"))
            elif isinstance(row, PromptRow):
                seen.add(row.prompt_id)
                requests += [Request(row, index) for index in range(self.videos_per_prompt)]
            else:
                requests.append(row)
        return requests


class _Collector:
    """One pass over the requests, in threads."""

    def __init__(self, endpoint: Endpoint, folder: Path, key: str | None):
        import openai

        # OpenAI closed its own video model in 2026 and marked these calls as deprecated (3.54); others speak them.
        warnings.filterwarnings("ignore", "The Sora API", DeprecationWarning)
        self._openai = openai
        self._client = openai.OpenAI(base_url=endpoint.url, api_key=key or "none", max_retries=0, timeout=60.0)
        self._endpoint, self._folder, self._key = endpoint, folder, key
        self._journal = Journal(folder / "journal.jsonl")
        self._stop = Event()
        self._spending, self._pacing = Lock(), Lock()
        self._next_request = 0.0
        self._of_prompt: dict[str, Lock] = defaultdict(Lock)  # a lost answer is looked for by its prompt
        self._over_budget = False

    def collect(self, requests: list[Request], on_video: Callable[[int, int], None]) -> None:
        states = (HAVE,) if self._endpoint.ask_again else (HAVE, REFUSED, LOST)
        todo = [request for request in requests if self._state(request) not in states]
        with ThreadPoolExecutor(self._endpoint.concurrency) as pool:
            waiting: set[Future[None]] = {pool.submit(self._obtain, request) for request in todo}
            try:
                while waiting:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                    on_video(len(requests) - len(waiting), len(requests))
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        late = sum(self._state(request) == ASKED and "reason" not in self._journal.last(request.asked)
                   for request in requests)  # fmt: skip
        if late:
            raise ConfigError(f"timeout_seconds ({self._endpoint.timeout_seconds:g}) must be longer: {late} videos are "
                              "asked for and not finished; the same command looks for them again")  # fmt: skip
        if self._over_budget:
            raise ConfigError(f"budget ({self._endpoint.budget:g}) must be higher for more videos: "
                              f"{self._journal.paid} at {self._endpoint.price:g} were asked for; a higher one goes on "
                              f"from there, and {LISTED} lists what is there for --teacher folder")  # fmt: skip

    def _state(self, request: Request) -> str | None:
        """The last one in the journal; a video whose file is gone is to be downloaded again."""
        state: str | None = self._journal.last(request.asked).get("state")
        return ASKED if state == HAVE and not (self._folder / request.video).exists() else state

    def _obtain(self, request: Request) -> None:
        """Ask unless that was done, wait, download; what a video cannot be had for is in the journal."""
        try:
            video_id = self._asked_before(request) or self._ask(request)
            if video_id is not None:
                self._wait(request, video_id)
                self._download(request, video_id)
        except RejectedError as error:
            self._journal.write(request.asked, REFUSED, reason=str(error))
            log.warning("%s: %s", request.video, error)
        except _GoneError:  # expired, or another url: the id stays, and is looked for again next time
            reason = "the teacher's video must still be there: the server has none of its id"
            self._journal.write(request.asked, ASKED, id=video_id, reason=reason)
            log.warning("%s: %s", request.video, reason)
        except _StoppedError:
            pass
        except BaseException:
            self._stop.set()  # before another thread asks for the next
            raise

    def _asked_before(self, request: Request) -> str | None:
        last = self._journal.last(request.asked)
        if last.get("state") == ASKING:  # an earlier run ended before the answer
            with self._of_prompt[request.row.prompt]:
                return self._find(request, last["at"])
        video_id: str | None = last.get("id") if last.get("state") in (ASKED, HAVE) else None
        return video_id

    def _ask(self, request: Request) -> str | None:
        """Ask until a request is accepted; its id, or None where there is none to wait for."""
        if self._journal.last(request.asked).get("state") == LOST and not self._endpoint.ask_again:
            return None
        problem: Exception
        for attempt in range(self._endpoint.attempts):
            self._pace()
            with self._of_prompt[request.row.prompt]:
                if not self._spend(request):
                    return None
                began = time.time()
                try:
                    video = self._create(request)
                except (self._openai.APIStatusError, self._openai.APIConnectionError) as error:
                    problem = error
                    status = getattr(error, "status_code", None)
                    never_sent = type(error.__cause__).__name__ in _NEVER_SENT
                    if status in _UNCLEAR or (status is None and not never_sent):
                        self._pause(self._endpoint.poll_seconds)  # the server may be at it still
                        found = self._find(request, began)
                        if found is not None or self._journal.last(request.asked).get("state") == LOST:
                            return found
                    else:
                        self._journal.write(request.asked, NOT_MADE)
                    wait_for = None
                    if isinstance(error, self._openai.APIStatusError):
                        self._judge(error)
                        wait_for = error.response.headers.get("retry-after")
                else:
                    video_id = getattr(video, "id", None)
                    if not isinstance(video_id, str):
                        self._journal.write(request.asked, NOT_MADE)
                        raise ConfigError(f"url ({self._endpoint.url}) must be an OpenAI-compatible videos endpoint: "
                                          "its answer is no video object, but a page of some other kind")  # fmt: skip
                    self._journal.write(request.asked, ASKED, id=video_id)
                    return video_id
            self._back_off(attempt, wait_for)
        raise self._gave_up(problem)

    def _create(self, request: Request) -> Any:
        more = {name: _filled(value, request.index) for name, value in self._endpoint.request.items()}
        key = f"{request.row.prompt_id}-{request.index}"
        return self._client.videos.create(
            prompt=request.row.prompt, model=self._endpoint.model, extra_body=more or None,
            # A connection kept open may break just as a request leaves, and nobody could tell whether it arrived.
            extra_headers={"Idempotency-Key": key, "Connection": "close"},
        )  # fmt: skip

    def _judge(self, error: Any) -> None:
        """Return where another attempt may help."""
        status = error.status_code
        if status in _STOP:
            raise ConfigError(f"url ({self._endpoint.url}) must make videos with this key and model "
                              f"{self._endpoint.model}: it answers {status}, {self._text(error)}")  # fmt: skip
        if status < 500 and status not in _AGAIN:
            raise RejectedError(f"the teacher refused the prompt: {self._text(error)}")

    def _find(self, request: Request, since: float) -> str | None:
        """The id of a request whose answer was lost, from the server's list; None where the journal says why."""
        try:
            videos = self._listed()
        except ConfigError:  # it does not answer now: the journal keeps the question for the next start
            raise
        except Exception as error:  # whatever a server without a list answers
            log.debug("no list: %s", self._text(error))
            reason = "the teacher was asked and no answer came: it may have been paid for; --ask-again asks once more"
            self._journal.write(request.asked, LOST, reason=reason)
            return None
        for video_id, prompt, created in videos:
            new = video_id not in self._journal.ids and created >= since - _CLOCKS_APART_SECONDS
            if new and prompt == request.row.prompt:
                self._journal.write(request.asked, ASKED, id=video_id)
                return str(video_id)
        self._journal.write(request.asked, NOT_MADE)
        return None

    def _listed(self) -> list[tuple[str, str, float]]:
        """Id, prompt and time of every video of the server."""
        for attempt in range(self._endpoint.attempts):
            try:
                found = [(video.id, video.prompt, float(video.created_at))
                         for video in self._client.videos.list(limit=100)]  # fmt: skip
            except (self._openai.APIConnectionError, self._openai.RateLimitError,
                    self._openai.InternalServerError) as error:  # fmt: skip
                problem: Exception = error
                self._back_off(attempt, None)
                continue
            if any(prompt is None for _, prompt, _ in found):
                raise ValueError("its videos have no prompt")
            return [(video_id, str(prompt), created) for video_id, prompt, created in found]
        raise self._gave_up(problem)

    def _wait(self, request: Request, video_id: str) -> None:
        deadline = time.monotonic() + self._endpoint.timeout_seconds
        while True:
            video = self._patiently(lambda: self._client.videos.retrieve(video_id))
            status = getattr(video, "status", None)
            if status == "completed":
                return
            if status in ("failed", "cancelled"):
                message = getattr(getattr(video, "error", None), "message", None) or status
                raise RejectedError(f"the teacher made no video: {self._text(message)}")
            if time.monotonic() > deadline:
                log.warning("%s is not finished after %g s; the same command looks again",
                            request.video, self._endpoint.timeout_seconds)  # fmt: skip
                raise _StoppedError
            self._pause(self._endpoint.poll_seconds)

    def _download(self, request: Request, video_id: str) -> None:
        def download() -> bytes:
            content: bytes = self._client.videos.download_content(video_id).read()
            if not _is_video(content):
                raise _NoVideoError("the teacher's file must be a video: it is something else, such as a web page")
            return content

        try:
            content = self._patiently(download)
        except _NoVideoError as error:
            raise RejectedError(str(error)) from None
        partial = self._folder / f".{request.video}.partial"
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._folder / request.video)
        self._journal.write(request.asked, HAVE, id=video_id)

    def _patiently(self, exchange: Callable[[], T]) -> T:
        """What may be done again and again without harm."""
        for attempt in range(self._endpoint.attempts):
            if self._stop.is_set():
                raise _StoppedError
            try:
                return exchange()
            except self._openai.APIStatusError as error:
                if error.status_code == 404:
                    raise _GoneError from None
                self._judge(error)
                problem: Exception = error
            except OSError as error:
                raise ConfigError(f"source ({self._folder}) must have room: {error.strerror}") from error
            except Exception as error:  # a connection that breaks in the middle has an error of the layer below
                problem = error
            self._back_off(attempt, None)
        if isinstance(problem, _NoVideoError):
            raise problem
        raise self._gave_up(problem)

    def _spend(self, request: Request) -> bool:
        """Whether the budget has room for one more; then it is in the journal."""
        with self._spending:
            endpoint = self._endpoint
            if endpoint.budget is not None and (self._journal.paid + 1) * endpoint.price > endpoint.budget * (1 + 1e-9):
                self._over_budget = True
                return False
            self._journal.write(request.asked, ASKING)
            return True

    def _pace(self) -> None:
        if self._stop.is_set():
            raise _StoppedError
        if self._endpoint.requests_per_minute is None:
            return
        with self._pacing:
            begin = max(time.monotonic(), self._next_request)
            self._next_request = begin + 60.0 / self._endpoint.requests_per_minute
        self._pause(begin - time.monotonic())

    def _back_off(self, attempt: int, retry_after: str | None) -> None:
        seconds = self._endpoint.backoff_seconds * 2**attempt * random.uniform(0.5, 1.0)
        if retry_after is not None and retry_after.replace(".", "", 1).isdigit():
            seconds = max(seconds, float(retry_after))
        self._pause(min(seconds, _NO_LONGER_THAN_SECONDS))

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(max(0.0, seconds)):
            raise _StoppedError

    def _gave_up(self, problem: Exception) -> ConfigError:
        return ConfigError(f"url ({self._endpoint.url}) must answer: {self._endpoint.attempts} attempts failed, "
                           f"the last with {self._text(problem)}; what was made stays, start again")  # fmt: skip

    def _text(self, said: Any) -> str:
        """One short line without the key, whatever a server repeats of a request."""
        line = " ".join(str(said).split())[:300]
        return line.replace(self._key, "***") if self._key else line


class _GoneError(Exception):
    """The server has no video of this id."""


class _NoVideoError(Exception):
    """What was downloaded is no video."""


def _filled(value: Any, index: int) -> Any:
    if value == "{index}":
        return index
    return value.replace("{index}", str(index)) if isinstance(value, str) else value


def _is_video(content: bytes) -> bool:
    """By the first bytes of mp4 and mov, webm and mkv, gif, avi."""
    return content[4:8] == b"ftyp" or content.startswith((b"\x1a\x45\xdf\xa3", b"GIF8", b"RIFF"))
