"""A judge behind HTTP. One request and its answer, both JSON:

    {"videos": [{"prompt": TEXT, "fps": NUMBER, "mp4": BASE64}, ...]}    ->    {"scores": [NUMBER, ...]}

Whatever else is answered is an error, and so is a server that does not answer in time, at the last of some attempts.
"""

import base64
import http.client
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import cached_property
from threading import Event
from typing import Any

import torch
from torch import Tensor

from afd_scale.codecs.conversions import to_uint8
from afd_scale.config import ConfigError, one_line
from afd_scale.config.judges import HttpJudgeConfig, backoff_seconds
from afd_scale.layers.network import Network
from afd_scale.mp4 import FrameArray, mp4_bytes
from afd_scale.types import JudgeError, UnreachableJudgeError, Videos, pieces

REQUESTS_AT_ONCE = 4
_SHOWN = 80  # characters of an answer that is none
_LARGEST = torch.finfo(torch.float32).max
_BUSY = 429
_MOST_BYTES = 16 * 2**20  # of an answer


class HttpJudge(Network):
    """What a server says of videos."""

    def __init__(self, config: HttpJudgeConfig):
        super().__init__()
        self.config = config

    @cached_property
    def _key(self) -> str | None:
        """Read when it is asked for: a plan needs none. `check_files` has looked at it before."""
        return read_key(self.config)

    def forward(self, videos: Videos) -> Tensor:
        """(B,) logits.

        Raises:
            JudgeError: see types.py.
        """
        assert videos.fps is not None, "a video is sent at a rate"
        pool, ended = ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="judge"), Event()
        answers: list[Future[list[float]]] = []
        try:
            for rows in pieces(len(videos), self.config.videos_per_request):
                part = videos[rows]
                clips = [to_uint8(part[row : row + 1].pixels()[0]) for row in range(len(part))]
                answers.append(pool.submit(self._score, clips, part.prompts.texts, videos.fps, ended))
            done, _ = wait(answers, return_when=FIRST_EXCEPTION)
            failed = [answer for answer in answers if answer in done and answer.exception()]
        finally:
            ended.set()
            pool.shutdown(cancel_futures=True)
        scores = [score for answer in failed[:1] or answers for score in answer.result()]  # or the first failure
        return torch.tensor(scores, dtype=torch.float32, device=videos.latents.device)

    def _score(self, clips: list[FrameArray], prompts: tuple[str, ...], fps: float, ended: Event) -> list[float]:
        """Of one request; it gives up where another one has failed."""
        videos = [
            {"prompt": prompt, "fps": fps, "mp4": base64.b64encode(mp4_bytes(clip, fps)).decode()}
            for prompt, clip in zip(prompts, clips, strict=True)
        ]
        request = urllib.request.Request(self.config.url, json.dumps({"videos": videos}).encode(), method="POST")
        request.add_header("Content-Type", "application/json")
        if self._key is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        problem = "nothing was asked"
        for attempt in range(self.config.retries + 1):
            if ended.wait(backoff_seconds(attempt - 1) if attempt else 0):
                break
            try:
                return self._read_scores(self._exchange(request), len(clips))
            except urllib.error.HTTPError as error:
                error.close()  # it holds the answer
                problem = f"it answered {error.code} {error.reason}"
                if error.code != _BUSY and error.code < 500:
                    raise self._wrong(problem) from None
            except urllib.error.URLError as error:  # refused, or too late with a connection
                problem = str(error.reason)
            except (OSError, http.client.HTTPException) as error:  # broken off, or too late with an answer
                problem = str(error) or type(error).__name__
        said = f"attempt {attempt + 1} of {self.config.retries + 1}, each of {self.config.timeout_seconds:g} s"
        raise UnreachableJudgeError(self._line(f"gave no answer: {said}, ended with {problem}"))

    def _exchange(self, request: urllib.request.Request) -> bytes:
        """The whole answer; a server that sends it drop by drop is late too."""
        deadline, answer = time.monotonic() + self.config.timeout_seconds, b""
        with urllib.request.urlopen(request, timeout=self.config.timeout_seconds) as response:
            while part := response.read1():
                answer += part
                if time.monotonic() > deadline:
                    raise TimeoutError("timed out")
                if len(answer) > _MOST_BYTES:
                    raise self._wrong(f"must answer in at most {_MOST_BYTES} bytes")
            if response.length:  # what was announced has not come
                raise http.client.IncompleteRead(b"", response.length)
        return answer

    def _read_scores(self, answer: bytes, videos: int) -> list[float]:
        text = self._redacted(answer.decode(errors="replace"))
        try:
            said: Any = json.loads(text)
        except (ValueError, RecursionError):
            said = None
        scores = said.get("scores") if isinstance(said, dict) else None
        if not isinstance(scores, list):
            raise self._wrong(f'must answer {{"scores": [...]}}: it answered {one_line(text)[:_SHOWN]!r}')
        if len(scores) != videos:
            raise self._wrong(f"must answer a score for each video: {len(scores)} for {videos}")
        for score in scores:
            number = isinstance(score, int | float) and not isinstance(score, bool)
            if not (number and abs(score) <= _LARGEST):  # false for NaN
                raise self._wrong(f"must answer finite numbers: a score is {str(score)[:_SHOWN]}")
        return [float(score) for score in scores]

    def _wrong(self, what: str) -> JudgeError:
        return JudgeError(self._line(what))

    def _line(self, what: str) -> str:
        """One line, without the key whatever a server repeats of a request."""
        return self._redacted(one_line(f"the judge at {self.config.url} {what}"))

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def read_key(config: HttpJudgeConfig) -> str | None:
    """The key of a judge's server.

    Raises:
        ConfigError: its file cannot be read, or is no key.
    """
    if config.key_file is None:
        return None
    try:
        key = config.key_file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"key_file ({config.key_file}) must be a file that can be read: {one_line(error)}") from None
    if not key or not (key.isascii() and key.isprintable()):
        raise ConfigError(f"key_file ({config.key_file}) must hold one line of printable ASCII: it goes into a header")
    return key
