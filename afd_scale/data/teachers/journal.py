"""What was asked of a teacher that is paid: an append-only file that outlives crashes."""

import errno
import json
import os
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, Required

from pydantic import AfterValidator, ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict

from afd_scale.config import ConfigError, one_line
from afd_scale.config.plain import UnreadableError
from afd_scale.files import checked_json, system_errors

Asked = tuple[str, int]  # prompt_id, and the number of the video among those of the prompt

ASKING = "asking"  # a request is about to leave; it may have been accepted and paid for: `asks` names what it asks
NOT_MADE = "not made"  # it was not accepted
ASKED = "asked"  # it was accepted: `id`; and `reason` where its video could not be had
HAVE = "have"  # its video is in the folder
REFUSED = "refused"  # there will be no video: `reason`
LOST = "lost"  # nobody can tell whether it was accepted


@with_config(ConfigDict(extra="allow"))
class _Entry(TypedDict, total=False):
    """A line."""

    prompt_id: Required[str]
    index: Required[int]
    state: Required[str]
    id: str
    reason: str
    asks: str


def _with_id(entry: _Entry) -> dict[str, Any]:
    if entry["state"] == ASKED and "id" not in entry:
        raise ValueError("id must be given: the request was accepted")
    return dict(entry)


_ENTRY: TypeAdapter[Any] = TypeAdapter(Annotated[_Entry, AfterValidator(_with_id)])


class Journal:
    """The last entry of each request; writing one is on disk when it returns. Threads may share it.

    Attributes:
        asks: of all requests, what they ask.
        ids: of all videos that were accepted.
        accepted: how often, by request.
        paid: requests that were accepted, or may have been.
    """

    def __init__(self, path: Path):
        """Read it; nothing is written.

        Raises:
            ConfigError: a line is none of ours.
        """
        self._path, self._lock = path, Lock()
        self._last: dict[Asked, dict[str, Any]] = {}
        self.asks: set[str] = set()
        self.ids: set[str] = set()
        self.accepted: Counter[Asked] = Counter()
        self.paid = 0
        content = path.read_bytes() if path.exists() else b""
        self._size = content.rfind(b"\n") + 1  # a crash may have cut the last line; it is written over
        for number, line in enumerate(content[: self._size].splitlines(), start=1):
            try:
                self._take(checked_json(line, _ENTRY))
            except UnreadableError as error:
                raise ConfigError(f"journal ({path}:{number}) must be a line that was written here: {error}"
                                  ) from error  # fmt: skip

    def last(self, asked: Asked) -> Mapping[str, Any]:
        """The last entry of a request; empty where there is none."""
        return self._last.get(asked, {})

    def write(self, asked: Asked, state: str, **more: Any) -> None:
        """Add an entry.

        Args:
            more: fields of this state; `asks` stays with the request.
        Raises:
            ConfigError: there is no room; the file is as it was before.
        """
        with self._lock:
            kept = {name: value for name, value in self.last(asked).items() if name == "asks"}
            if "reason" in more:
                more["reason"] = one_line(more["reason"])  # which may repeat what a server said
            entry = {"prompt_id": asked[0], "index": asked[1], "state": state, "at": time.time(), **kept, **more}
            line = json.dumps(entry).encode() + b"\n"
            with system_errors(f"journal ({self._path}) must have room"):
                self._append(line)
            self._size += len(line)
            self._take(entry)

    def _append(self, line: bytes) -> None:
        with self._path.open("ab", buffering=0) as file:
            file.truncate(self._size)
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(self._size)
                raise

    def _take(self, entry: dict[str, Any]) -> None:
        asked = entry["prompt_id"], entry["index"]
        self._last[asked] = entry
        self.asks |= {entry["asks"]} if "asks" in entry else set()
        if "id" in entry and entry["id"] not in self.ids:
            self.ids.add(entry["id"])
            self.accepted[asked] += 1
        self.paid += {ASKING: 1, NOT_MADE: -1}.get(entry["state"], 0)
