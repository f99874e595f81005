"""Collects videos from a video API: create, look, download.

Every step is in a journal before it is taken. Where nobody can tell whether a request was accepted, its video is lost
rather than asked for twice.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Lock

import httpx

from afd_scale.codecs.codec import RejectedError
from afd_scale.config import ConfigError
from afd_scale.data.clips import Clip
from afd_scale.data.teachers.exchange import NEVER_SENT, AnswerError, Exchange, NotHadError, StoppedError
from afd_scale.data.teachers.faults import Fault, fault_of, is_unpaid
from afd_scale.data.teachers.journal import ASKED, ASKING, HAVE, LOST, NOT_MADE, REFUSED, Journal
from afd_scale.data.video import check_video
from afd_scale.files import replacing, system_errors

log = logging.getLogger(__name__)


class Collector:
    """One pass over the requests, in threads; videos are kept in `folder`."""

    def __init__(self, exchange: Exchange, folder: Path, journal: Journal):
        self._exchange, self._endpoint, self._folder, self._journal = exchange, exchange.endpoint, folder, journal
        self._accounting = Lock()
        self._over_budget = False

    def collect(self, clips: list[Clip], on_video: Callable[[int, int], None]) -> None:
        """Settle the request for every clip.

        Args:
            on_video: called with the number of requests that are settled, and of all.
        Raises:
            ConfigError: the endpoint cannot be used, the budget is spent, a video is late, or the folder is full.
        """
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

    def _obtain(self, clip: Clip) -> None:
        """Ask unless that was done, wait, download; what a video cannot be had for is in the journal."""
        again = self._endpoint.ask_again
        try:
            if self._state(clip) == ASKING:  # an earlier run ended before the answer
                self._journal.write(clip.asked, LOST)
            if self._state(clip) == ASKED and not (self._fetch(clip, self._journal.last(clip.asked)["id"]) and again):
                return
            if self._state(clip) != LOST or again:
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

    def _ask(self, clip: Clip) -> str | None:
        """Ask until a request is accepted; its id, or None where there is none to wait for."""
        try:
            return self._exchange.patiently(lambda: self._ask_once(clip))
        except NotHadError as error:
            raise ConfigError(f"url ({self._endpoint.url}) must answer: {error}; what was made stays, start again"
                              ) from None  # fmt: skip

    def _ask_once(self, clip: Clip) -> str | None:
        self._exchange.pace()
        request = self._endpoint.create(clip.prompt, clip.index)
        if not self._spend(clip):
            return None
        # A server that honours the key gives the video of an earlier request again, unless that one is settled.
        key = f"{clip.prompt_id}-{clip.index}-{self._endpoint.asks(clip.prompt)}-{self._journal.accepted[clip.asked]}"
        try:
            video_id = self._exchange.create(request, key)
        except (AnswerError, httpx.HTTPError) as error:
            if self._settle(clip, error) is Fault.UNCLEAR:
                return None
            raise
        except Exception as error:  # whatever it is, the request may have been accepted
            self._journal.write(clip.asked, LOST)
            raise ConfigError(f"url ({self._endpoint.url}) must answer: {self._exchange.text(error)}") from error
        with self._accounting:
            if video_id in self._journal.ids:
                raise RejectedError(f"the teacher must make a video of its own: it names another's, {video_id}")
            self._journal.write(clip.asked, ASKED, id=video_id)
        return video_id

    def _spend(self, clip: Clip) -> bool:
        """Whether the budget has room for one more; then it is in the journal."""
        with self._accounting:
            endpoint = self._endpoint
            if endpoint.budget is not None and (self._journal.paid + 1) * endpoint.price > endpoint.budget * (1 + 1e-9):
                self._over_budget = True
                return False
            self._journal.write(clip.asked, ASKING, asks=endpoint.asks(clip.prompt))
            return True

    def _settle(self, clip: Clip, error: AnswerError | httpx.HTTPError) -> Fault:
        """Write into the journal what became of a request that was not answered with a video; whose fault it is.

        Raises:
            ConfigError, RejectedError: another attempt would not help.
        """
        if isinstance(error, AnswerError):
            fault, lost = fault_of(error.status, error.said.replace(clip.prompt, "")), not error.refuses
        else:
            fault, lost = Fault.BUSY if isinstance(error, NEVER_SENT) else Fault.UNCLEAR, False
        self._journal.write(clip.asked, LOST if lost or fault is Fault.UNCLEAR else NOT_MADE)
        if fault is Fault.ACCOUNT:
            raise self._exchange.account_at_fault(error)
        if fault is Fault.PROMPT:
            raise RejectedError(f"the teacher refused the prompt: {self._exchange.text(error)}")
        return fault

    # --- what was accepted

    def _fetch(self, clip: Clip, video_id: str) -> bool:
        """Wait for a video and download it; whether it is gone. Where it was not had, the journal keeps its id."""
        try:
            link = self._wait(clip, video_id)
            self._exchange.patiently(lambda: self._download(clip, link))
        except NotHadError as error:
            why = f"the server must give the teacher's video: {error}"
            self._journal.write(clip.asked, ASKED, id=video_id, reason=why)
            log.warning("%s: %s", clip.video, why)
            return error.gone
        self._journal.write(clip.asked, HAVE, id=video_id)
        return False

    def _wait(self, clip: Clip, video_id: str) -> str:
        """Wait until a video is finished; where it is."""
        deadline = time.monotonic() + self._endpoint.timeout_seconds
        while True:
            look = self._exchange.patiently(lambda: self._exchange.look(video_id))
            if look.link is not None:
                return look.link
            if look.end is not None:
                if is_unpaid(look.said.replace(clip.prompt, "")):
                    self._journal.write(clip.asked, NOT_MADE)
                    raise self._exchange.account_at_fault(look.said)
                why = f"{look.end}, {look.said}" if look.said else look.end
                raise RejectedError(f"the teacher made no video: {self._exchange.text(why)}")
            if time.monotonic() > deadline:
                log.warning("%s is not finished after %g s; the same command looks again",
                            clip.video, self._endpoint.timeout_seconds)  # fmt: skip
                raise StoppedError
            self._exchange.pause(self._endpoint.poll_seconds)

    def _download(self, clip: Clip, link: str) -> None:
        content = self._exchange.download(link)
        remedy = "; what was paid for is downloaded when the same command is given again"
        with (
            system_errors(f"source ({self._folder}) must have room", remedy),
            replacing(self._folder / clip.video) as partial,
        ):
            partial.write_bytes(content)
            try:
                check_video(partial)
            except RejectedError as error:
                raise NotHadError(f"its file cannot be used, it {error}") from error  # another attempt may bring it
