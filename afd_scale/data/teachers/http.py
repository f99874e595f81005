"""A teacher behind a video API.

Videos and a journal stay in a folder, so that nothing is asked or paid for twice: not after a crash, not after Ctrl-C,
and not when shards are made again in another form.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from afd_scale.codecs.cleaning import clean_prompt
from afd_scale.codecs.codec import VideoForm
from afd_scale.config import ConfigError
from afd_scale.data.clips import Clip, Frames, Reject
from afd_scale.data.teachers.collector import Collector
from afd_scale.data.teachers.exchange import STUB, Endpoint, Exchange
from afd_scale.data.teachers.journal import HAVE, LOST, NOT_MADE, Journal
from afd_scale.data.teachers.prompts import prompt_id_of, read_prompts
from afd_scale.data.teachers.protocols import PROTOCOLS
from afd_scale.data.teachers.stub import Stub
from afd_scale.data.video import file_fingerprint, read_video
from afd_scale.files import only_one, system_errors, write_text

JOURNAL = "journal.jsonl"
_NOBODY_KNOWS = "the teacher was asked and no answer came: it may have been paid for; --ask-again asks once more"


class HttpTeacher:
    """Videos of an endpoint, kept in a folder with a journal. `collect` asks for them; the rest needs no network."""

    clips_at_once = 64

    def __init__(
        self, endpoint: Endpoint, prompts: Path, folder: Path, *, videos_per_prompt: int = 1, key: str | None = None,
        name: str | None = None, columns: Mapping[str, str] | None = None,
    ):  # fmt: skip
        """Args:
            prompts, columns: see `read_prompts`.
            folder: of videos and journal; made where it is not there.
            key: of the endpoint; it is written nowhere. None is for servers that want none.
            name: of the teacher; None takes the model's.
        """  # fmt: skip
        self.endpoint, self.prompts, self.folder, self.columns = endpoint, prompts, folder, columns
        self.videos_per_prompt, self._key = videos_per_prompt, key
        self._rehearses = endpoint.url == STUB
        self.name = name or f"{STUB if self._rehearses else 'http'}:{endpoint.model}"
        self.provenance: dict[str, Any] = {
            "name": "http", "url": endpoint.url, "model": endpoint.model, "request": dict(endpoint.request)
        }  # fmt: skip
        if endpoint.protocol != "openai":  # datasets that were begun before there were others go on
            self.provenance["protocol"] = endpoint.protocol

    def plan(self) -> str:
        """The request for the first video, as JSON without the key, and what all cost; nothing is asked.

        Raises:
            ConfigError: the prompts cannot be read, none can be used, or the folder is of other requests.
        """
        clips = self._clips_to_ask_for()
        endpoint, journal = self.endpoint, self._journal(clips)
        request = endpoint.create(clips[0].prompt, clips[0].index)
        body = {"json": request.json} if request.form is None else {"form": request.form}
        name, before = PROTOCOLS[endpoint.protocol].key_header
        shown = {"method": "POST", "url": f"{endpoint.url.rstrip('/')}/{request.path}",
                 "headers": {name: f"{before}***"} if self._key else {}, **body}  # fmt: skip
        there = sum(journal.last(clip.asked).get("state") not in (None, NOT_MADE) for clip in clips)
        left = len(clips) - there
        cost = f"{len(clips)} videos at {endpoint.price:g}: {len(clips) * endpoint.price:g}"
        return (f"{json.dumps(shown, indent=1, ensure_ascii=False)}\n{cost}; {there} are asked for already, the other "
                f"{left} cost {left * endpoint.price:g}; nothing was asked")  # fmt: skip

    def collect(self, on_video: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Ask for every video that the folder lacks, and download it; on one process.

        Args:
            on_video: called with the number of videos that are settled, and of all.
        Raises:
            ConfigError: there is no prompt, the endpoint cannot be used, the budget is spent, the folder is of other
                requests, or another process collects into it.
        """
        clips, endpoint = self._clips_to_ask_for(), self.endpoint
        with system_errors(f"source ({self.folder}) must be a folder to keep videos in"):
            self.folder.mkdir(parents=True, exist_ok=True)
        with (
            only_one(self.folder / ".lock", f"source ({self.folder}) must be filled by one process at a time"),
            ExitStack() as opened,
        ):
            journal, url = self._journal(clips), endpoint.url
            opened.callback(self._list_videos)
            if self._rehearses:
                url = opened.enter_context(closing(Stub(endpoint.protocol))).url
            exchange = opened.enter_context(closing(Exchange(endpoint, self._key, url)))
            Collector(exchange, self.folder, journal).collect(clips, on_video)

    def _clips_to_ask_for(self) -> list[Clip]:
        clips = [clip for clip in self._asked_for() if isinstance(clip, Clip)]
        if not clips:
            raise ConfigError(f"prompts ({self.prompts}) must have one that can be used: there is none")
        return clips

    def _journal(self, clips: list[Clip]) -> Journal:
        """The folder's; ConfigError where that is of other requests than those for these clips."""
        journal = Journal(self.folder / JOURNAL)
        if any(asks.startswith(STUB) != self._rehearses for asks in journal.asks):
            raise ConfigError(f"source ({self.folder}) must be of a rehearsal (url {STUB}) or of real videos, not of "
                              "both: name another folder")  # fmt: skip
        for clip in clips:
            if journal.last(clip.asked).get("asks") not in (None, self.endpoint.asks(clip.prompt)):
                raise ConfigError(f"source ({self.folder}) must be of the same prompts, protocol, model and request: "
                                  f"{clip.video} was asked for with others; name another folder")  # fmt: skip
        return journal

    def _list_videos(self) -> None:
        """What is there with its prompts, as the folder teacher reads them."""
        rows = [{"video": clip.video, "prompt": clip.prompt, "prompt_id": clip.prompt_id, "split": clip.split}
                for clip in self.clips() if isinstance(clip, Clip)]  # fmt: skip
        with system_errors(f"source ({self.folder}) must have room"):
            write_text(self.folder / "videos.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def clips(self) -> list[Clip | Reject]:
        journal = Journal(self.folder / JOURNAL)

        def had(clip: Clip) -> Clip | Reject:
            last = journal.last(clip.asked)
            if last.get("state") == HAVE:
                return replace(clip, prompt=clean_prompt(clip.prompt))
            why = _NOBODY_KNOWS if last.get("state") == LOST else "there is no video yet; the same command asks again"
            return Reject(clip.video, clip.prompt, last.get("reason", why))

        return [clip if isinstance(clip, Reject) else had(clip) for clip in self._asked_for()]

    def fingerprint(self, clip: Clip) -> str:
        return file_fingerprint(self.folder / clip.video)

    def frames(self, clip: Clip, form: VideoForm) -> Frames:
        return read_video(self.folder / clip.video, form)

    def _asked_for(self) -> Iterator[Clip | Reject]:
        """A prompt's videos follow one another."""
        journal = Journal(self.folder / JOURNAL)
        for row in read_prompts(self.prompts, columns=self.columns, once=True):
            if isinstance(row, Reject):
                yield row
                continue
            prompt, prompt_id = row.prompt, row.prompt_id
            # Folders that were begun before prompts were cleaned hold videos, paid for, of prompts as they are written.
            if row.written and prompt_id == prompt_id_of(prompt):
                as_written = prompt_id_of(row.written)
                if any(journal.last((as_written, index)) for index in range(self.videos_per_prompt)):
                    prompt, prompt_id = row.written, as_written
            for index in range(self.videos_per_prompt):
                yield Clip(f"{prompt_id}-{index}.mp4", prompt, prompt_id, index, row.split)
