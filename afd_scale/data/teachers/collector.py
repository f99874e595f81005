"""Collects videos from an OpenAI-compatible videos endpoint: create, poll, download.

Every step is in a journal before it is taken. Where nobody can tell whether a request was accepted, the server's list
of videos is searched; where that cannot tell either, the video is given up rather than asked for twice.
"""

import hashlib
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Lock
from typing import Any

from afd_scale.codecs.codec import RejectedError
from afd_scale.config import ConfigError
from afd_scale.data.clips import Clip
from afd_scale.data.teachers.exchange import AGAIN, Exchange, NotHadError, StoppedError, folded
from afd_scale.data.teachers.journal import ASKED, ASKING, HAVE, LOST, NOT_MADE, REFUSED, Journal
from afd_scale.data.video import check_video
from afd_scale.files import replacing, system_errors

log = logging.getLogger(__name__)

_NEVER_SENT = ("ConnectError", "ConnectTimeout")  # of httpx, whichever package of that family openai is built on
_CLOCKS_APART_SECONDS = 900.0  # the server's and ours, at most
_STOP = (401, 403, 404, 405)  # to a request for a video: the next one would be answered alike
_UNCLEAR = (408, 409)  # and 5xx: what is behind whoever answered may go on
_NOT_TAKEN = (500, 503)  # the usual words for "not now": believed where the server has no list


class Collector:
    """One pass over the requests, in threads; videos are kept in `folder`."""

    def __init__(self, exchange: Exchange, folder: Path, journal: Journal):
        self._exchange, self._endpoint, self._folder, self._journal = exchange, exchange.endpoint, folder, journal
        self._spending = Lock()
        self._of_prompt: dict[str, Lock] = defaultdict(Lock)  # a lost answer is looked for by its prompt
        self._prompts: set[str] = set()
        self._over_budget = False

    def collect(self, clips: list[Clip], on_video: Callable[[int, int], None]) -> None:
        """Settle the request for every clip.

        Args:
            on_video: called with the number of requests that are settled, and of all.
        Raises:
            ConfigError: the endpoint cannot be used, the budget is spent, a video is late, or the folder is full or of
                other requests.
        """
        for clip in clips:
            if self._journal.last(clip.asked).get("asks") not in (None, self._asks(clip)):
                raise ConfigError(f"source ({self._folder}) must be of the same prompts, model and request: "
                                  f"{clip.video} was asked for with others; name another folder")  # fmt: skip
        self._prompts = {folded(clip.prompt) for clip in clips}
        states = (HAVE,) if self._endpoint.ask_again else (HAVE, REFUSED, LOST)
        todo = [clip for clip in clips if self._state(clip) not in states]
        with ThreadPoolExecutor(self._endpoint.concurrency) as pool:
            obtained = [pool.submit(self._obtain, clip) for clip in todo]
            try:
                for settled, future in enumerate(as_completed(obtained), len(clips) - len(todo) + 1):
                    future.result()
                    on_video(settled, len(clips))
            except BaseException:
                self._exchange.stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        self._check_complete(clips)

    def _check_complete(self, clips: list[Clip]) -> None:
        late = sum(self._state(clip) == ASKED and "reason" not in self._journal.last(clip.asked) for clip in clips)
        if late:
            raise ConfigError(f"timeout_seconds ({self._endpoint.timeout_seconds:g}) must be longer: {late} videos are "
                              "asked for and not finished; the same command looks for them again")  # fmt: skip
        if self._over_budget:
            raise ConfigError(f"budget ({self._endpoint.budget:g}) must be higher for more videos: "
                              f"{self._journal.paid} at {self._endpoint.price:g} were asked for; a higher one goes on "
                              "from there, and videos.jsonl lists what is there for --teacher folder")  # fmt: skip

    def _state(self, clip: Clip) -> str | None:
        """The last one in the journal; a video whose file is gone is to be downloaded again."""
        state: str | None = self._journal.last(clip.asked).get("state")
        return ASKED if state == HAVE and not (self._folder / clip.video).exists() else state

    def _asks(self, clip: Clip) -> str:
        """Names what is asked, but for the number of the video."""
        asks = (clip.prompt, self._endpoint.model, dict(self._endpoint.request))
        return hashlib.blake2b(json.dumps(asks, sort_keys=True).encode(), digest_size=8).hexdigest()

    def _obtain(self, clip: Clip) -> None:
        """Ask unless that was done, wait, download; what a video cannot be had for is in the journal."""
        try:
            video_id = self._asked_before(clip)
            if video_id is None or (not self._fetch(clip, video_id) and self._endpoint.ask_again):
                video_id = self._ask(clip)
                if video_id is not None:
                    self._fetch(clip, video_id)
        except RejectedError as error:
            self._journal.write(clip.asked, REFUSED, reason=str(error))
            log.warning("%s: %s", clip.video, error)
        except StoppedError:
            pass
        except BaseException:
            self._exchange.stop.set()  # before another thread asks for the next
            raise

    # --- asking

    def _asked_before(self, clip: Clip) -> str | None:
        if self._state(clip) == ASKING:  # an earlier run ended before the answer
            with self._of_prompt[folded(clip.prompt)]:
                self._find(clip, LOST)
        return self._journal.last(clip.asked)["id"] if self._state(clip) == ASKED else None

    def _ask(self, clip: Clip) -> str | None:
        """Ask until a request is accepted; its id, or None where there is none to wait for."""
        if self._state(clip) == LOST and not self._endpoint.ask_again:
            return None
        problem: Exception | None = None
        for attempt in range(self._endpoint.attempts):
            self._exchange.back_off(attempt, problem)
            self._exchange.pace()
            with self._of_prompt[folded(clip.prompt)]:
                self._exchange.pause(0.0)  # the job may have been stopped while another request had the lock
                if not self._spend(clip):
                    return None
                try:
                    return self._create(clip)
                except self._exchange.failures as error:
                    problem = error
                    self._settle(clip, error)
                if self._state(clip) in (ASKED, LOST):
                    return self._journal.last(clip.asked).get("id")
        assert problem is not None, "there is at least one attempt"
        raise self._exchange.gave_up(problem)

    def _create(self, clip: Clip) -> str:
        """Ask once; the id of what was accepted."""
        more = {name: _filled(value, clip.index) for name, value in self._endpoint.request.items()}
        # A server that honours the key gives the video of an earlier request again, unless that one is settled.
        key = f"{clip.prompt_id}-{clip.index}-{self._asks(clip)}-{self._journal.accepted[clip.asked]}"
        try:
            video: Any = self._exchange.videos.create(
                prompt=clip.prompt, model=self._endpoint.model, extra_body=more or None,
                # A connection kept open may break just as a request leaves; nobody could tell whether it arrived.
                extra_headers={"Idempotency-Key": key, "Connection": "close"},
            )  # fmt: skip
        except ValueError:  # it says that it is JSON, and is not
            video = None
        video_id = getattr(video, "id", None)
        if not isinstance(video_id, str):
            self._journal.write(clip.asked, NOT_MADE)
            raise ConfigError(f"url ({self._endpoint.url}) must be an OpenAI-compatible videos endpoint: "
                              "its answer is no video object, but a page of some other kind")  # fmt: skip
        self._journal.write(clip.asked, ASKED, id=video_id)
        return video_id

    def _settle(self, clip: Clip, error: Any) -> None:
        """Write into the journal what became of a request that was not answered with a video.

        Raises:
            ConfigError, RejectedError: another attempt would not help.
        """
        status = getattr(error, "status_code", None)
        never_sent = status is None and type(error.__cause__).__name__ in _NEVER_SENT
        if never_sent or (status is not None and status < 500 and status not in _UNCLEAR):
            self._journal.write(clip.asked, NOT_MADE)
        else:
            self._exchange.pause(self._endpoint.poll_seconds)  # the server may be at it still
            self._find(clip, NOT_MADE if status in _NOT_TAKEN else LOST)
        if status is None or self._state(clip) != NOT_MADE:
            return
        if status in _STOP:
            raise ConfigError(f"url ({self._endpoint.url}) must make videos with this key and model "
                              f"{self._endpoint.model}: it answers {status}, {self._exchange.text(error)}")  # fmt: skip
        if status < 500 and status not in AGAIN:
            raise RejectedError(f"the teacher refused the prompt: {self._exchange.text(error)}")

    def _find(self, clip: Clip, if_nobody_knows: str) -> None:
        """Look for an accepted request in the server's list, and write into the journal what is there."""
        try:
            video_id = self._listed(clip)
        except (ConfigError, StoppedError):  # no answer now: the journal keeps the question for the next start
            raise
        except Exception as error:  # whatever a server without a list answers
            log.debug("the server's list cannot tell: %s", self._exchange.text(error))
            self._journal.write(clip.asked, if_nobody_knows)
            return
        if video_id is None:
            self._journal.write(clip.asked, NOT_MADE)
        else:
            self._journal.write(clip.asked, ASKED, id=video_id)

    def _listed(self, clip: Clip) -> str | None:
        """The id of a request without an answer, from the server's list; None where it was not accepted.

        A list is believed where it shows all our videos with prompts as we sent them, and one while we have none.

        Raises:
            ValueError: it cannot tell.
        """
        listed, mine = self._exchange.listed(), folded(clip.prompt)
        since = self._journal.last(clip.asked)["at"] - _CLOCKS_APART_SECONDS
        known = [video for video in listed if video.id in self._journal.ids]
        new = [video for video in listed if folded(video.prompt) == mine and video.id not in self._journal.ids]
        for video in new:
            if video.created_at is None or video.created_at >= since:
                return video.id
        if new:
            raise ValueError("it shows an earlier video of this prompt, or its clock is far behind")
        as_sent = [folded(video.prompt) in self._prompts for video in known or listed]
        if not (all(as_sent) if known else any(as_sent) or not listed):
            raise ValueError("it shows other prompts than were sent")
        return None

    # --- what was accepted

    def _fetch(self, clip: Clip, video_id: str) -> bool:
        """Wait for a video and download it; whether it was had. Where it was not, the journal keeps its id."""
        try:
            self._wait(clip, video_id)
            self._download(clip, video_id)
        except NotHadError as error:
            self._journal.write(clip.asked, ASKED, id=video_id, reason=str(error))
            log.warning("%s: %s", clip.video, error)
            return False
        return True

    def _wait(self, clip: Clip, video_id: str) -> None:
        deadline = time.monotonic() + self._endpoint.timeout_seconds
        while True:
            video = self._exchange.patiently(lambda: self._exchange.videos.retrieve(video_id))
            status = getattr(video, "status", None)
            if status == "completed":
                return
            if status in ("failed", "cancelled"):
                message = getattr(getattr(video, "error", None), "message", None) or status
                raise RejectedError(f"the teacher made no video: {self._exchange.text(message)}")
            if time.monotonic() > deadline:
                log.warning("%s is not finished after %g s; the same command looks again",
                            clip.video, self._endpoint.timeout_seconds)  # fmt: skip
                raise StoppedError
            self._exchange.pause(self._endpoint.poll_seconds)

    def _download(self, clip: Clip, video_id: str) -> None:
        remedy = "; what was paid for is downloaded when the same command is given again"

        def download() -> None:
            content: bytes = self._exchange.videos.download_content(video_id).read()
            with (
                system_errors(f"source ({self._folder}) must have room", remedy),
                replacing(self._folder / clip.video) as partial,
            ):
                partial.write_bytes(content)
                check_video(partial)

        self._exchange.patiently(download)
        self._journal.write(clip.asked, HAVE, id=video_id)

    def _spend(self, clip: Clip) -> bool:
        """Whether the budget has room for one more; then it is in the journal."""
        with self._spending:
            endpoint = self._endpoint
            if endpoint.budget is not None and (self._journal.paid + 1) * endpoint.price > endpoint.budget * (1 + 1e-9):
                self._over_budget = True
                return False
            self._journal.write(clip.asked, ASKING, asks=self._asks(clip))
            return True


def _filled(value: Any, index: int) -> Any:
    if value == "{index}":
        return index
    return value.replace("{index}", str(index)) if isinstance(value, str) else value
