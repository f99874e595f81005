"""What was asked of a teacher that is paid: an append-only file that outlives crashes."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

Asked = tuple[str, int]  # prompt_id, and the number of the video among those of the prompt

ASKING = "asking"  # a request is about to leave; it may have been accepted and paid for
NOT_MADE = "not made"  # it was not accepted
ASKED = "asked"  # it was accepted: `id`
HAVE = "have"  # its video is in the folder
REFUSED = "refused"  # there will be no video: `reason`
LOST = "lost"  # nobody can tell whether it was accepted: `reason`


class Journal:
    """The last entry of each request; writing one is on disk when it returns. Threads may share it."""

    def __init__(self, path: Path):
        self._path, self._lock = path, Lock()
        self._last: dict[Asked, dict[str, Any]] = {}
        self.ids: set[str] = set()
        self.paid = 0  # requests that were accepted, or may have been
        if path.exists():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]  # a crash may have cut the last line
            if whole != content:
                with path.open("r+b") as file:
                    file.truncate(len(whole))
            for line in whole.splitlines():
                self._take(json.loads(line))

    def last(self, asked: Asked) -> Mapping[str, Any]:
        """The last entry of a request; empty where there is none."""
        return self._last.get(asked, {})

    def write(self, asked: Asked, state: str, **more: Any) -> None:
        entry = {"prompt_id": asked[0], "index": asked[1], "state": state, "at": time.time(), **more}
        with self._lock:
            with self._path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._take(entry)

    def _take(self, entry: dict[str, Any]) -> None:
        self._last[entry["prompt_id"], entry["index"]] = entry
        if "id" in entry:
            self.ids.add(entry["id"])
        self.paid += {ASKING: 1, NOT_MADE: -1}.get(entry["state"], 0)
