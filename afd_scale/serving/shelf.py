"""Videos that were asked for through the videos API: made one after the other, kept for a while, given by id."""

import secrets
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from afd_scale.config import ConfigError, one_line
from afd_scale.config.errors import shown
from afd_scale.config.section import Section
from afd_scale.serving.line import LeftError, Line, Turn
from afd_scale.serving.studio import Studio

Prompt = Annotated[str, StringConstraints(min_length=1, max_length=4000)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Status = Literal["queued", "in_progress", "completed", "failed"]


class Asked(Section):
    """What a request for a video may say; a form has all as text."""

    prompt: Prompt
    """What is to be seen."""
    model: str | None = Field(default=None, max_length=300)
    """Of this server; None takes it."""
    seconds: float | None = Field(default=None, gt=0)
    """Of the video; None is as long as the student learned."""
    size: str | None = Field(default=None, max_length=20)
    """WIDTHxHEIGHT, this server's; None takes it."""
    seed: Seed | None = None
    """Of the noise; None draws one."""


@dataclass
class Video:
    """A video that was asked for.

    Attributes:
        frames: of it.
        made: percent.
        said: why there is none, one line.
    """

    video_id: str
    prompt: str
    frames: int
    seed: int
    path: Path
    created: int = field(default_factory=lambda: int(time.time()))
    completed: int | None = None
    status: Status = "queued"
    made: int = 0
    said: str | None = None
    turn: Turn = field(init=False)

    @property
    def is_over(self) -> bool:
        return self.status in ("completed", "failed")


class Shelf:
    """Asks the studio for videos and keeps them.

    Args:
        folder: of their files.
        longest_seconds: of a video.
        keeps: so many finished ones; older ones go.
    """

    def __init__(self, studio: Studio, line: Line, folder: Path, *, longest_seconds: float, keeps: int):
        self.studio, self.line, self.folder = studio, line, folder
        self.longest_seconds, self.keeps = longest_seconds, keeps
        self._videos: dict[str, Video] = {}  # the oldest first
        self._of_key: dict[str, tuple[Asked, str]] = {}  # an Idempotency-Key to what it asked for, and the video's id
        self._lock = threading.Lock()

    def ask(self, asked: Asked, key: str | None = None) -> Video:
        """Put a video into the line.

        Args:
            key: names the request: another with the same key is given the same video, as long as that is kept.
        Raises:
            ConfigError: the student makes none of this kind.
            FullError: too many wait.
        """
        with self._lock:
            earlier, video_id = self._of_key.get(key or "", (None, ""))
            if earlier is not None and video_id in self._videos:
                if earlier != asked:
                    raise ConfigError(f"idempotency-key ({shown(key)}) must be of one request: it came with another")
                return self._videos[video_id]
            video = self._video_of(asked)
            self.line.join(video.turn)
            self._videos[video.video_id] = video
            if key:
                self._of_key[key] = asked, video.video_id
            self._let_go()
            return video

    def find(self, video_id: str) -> Video | None:
        return self._videos.get(video_id)

    def remove(self, video: Video) -> None:
        """Take a video away; one that is being made ends."""
        self.line.leave(video.turn)
        with self._lock:
            self._drop(video.video_id)

    def state(self, video: Video) -> dict[str, Any]:
        """What the API says of a video."""
        pixels = self.studio.pixels
        error = None if video.said is None else {"code": "generation_failed", "message": video.said}
        return {
            "id": video.video_id, "object": "video", "model": self.studio.name, "status": video.status,
            "progress": video.made, "created_at": video.created, "completed_at": video.completed, "error": error,
            "prompt": video.prompt, "seconds": f"{video.frames / pixels.fps:g}", "size": self.size, "seed": video.seed,
        }  # fmt: skip

    @property
    def size(self) -> str:
        """WIDTHxHEIGHT of all videos."""
        return f"{self.studio.pixels.width}x{self.studio.pixels.height}"

    def _video_of(self, asked: Asked) -> Video:
        if asked.model not in (None, "", self.studio.name):
            raise ConfigError(f"model ({shown(asked.model)}) must be {self.studio.name}: this server has no other")
        if asked.size not in (None, self.size):
            raise ConfigError(f"size ({shown(asked.size)}) must be {self.size}: this server was started with that")
        if asked.seconds is not None and asked.seconds > self.longest_seconds:
            raise ConfigError(f"seconds ({asked.seconds:g}) must be at most {self.longest_seconds:g}")
        frames = self.studio.pixels.frames if asked.seconds is None else self.studio.frames_of(asked.seconds)
        self.studio.form(frames)
        video_id = f"video_{secrets.token_hex(12)}"
        seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed
        video = Video(video_id, asked.prompt, frames, seed, self.folder / f"{video_id}.mp4")
        video.turn = Turn(lambda turn: self._make(video, turn))
        return video

    def _make(self, video: Video, turn: Turn) -> None:
        """On the worker's thread."""
        video.status = "in_progress"
        try:
            for percent in self.studio.write(video.prompt, video.seed, video.frames, video.path, turn.check):
                video.made = percent
        except LeftError:
            self._end(video, "it was taken back")
        except (ValueError, OSError) as error:
            self._end(video, one_line(error))
        except Exception:
            self._end(video, "the server failed: its log says why")
            raise
        else:
            self._end(video, None)

    def _end(self, video: Video, said: str | None) -> None:
        video.said, video.completed = said, int(time.time())
        video.status = "completed" if said is None else "failed"  # the last: who sees it may read the file
        with self._lock:
            if video.video_id not in self._videos:  # taken away meanwhile
                video.path.unlink(missing_ok=True)

    def _let_go(self) -> None:
        over = [video.video_id for video in self._videos.values() if video.is_over]
        for video_id in over[: max(0, len(over) - self.keeps)]:
            self._drop(video_id)

    def _drop(self, video_id: str) -> None:
        video = self._videos.pop(video_id, None)
        if video is not None:
            video.path.unlink(missing_ok=True)
            self._of_key = {key: of for key, of in self._of_key.items() if of[1] != video_id}
