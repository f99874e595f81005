"""One run, one owner: two jobs that train into one folder would tear each other's files apart."""

import logging
import shutil
import socket
import time
from pathlib import Path

from filelock import FileLock, Timeout

from afd_scale.config import ConfigError
from afd_scale.parallel.heartbeats import BEAT_SECONDS, FOLDER, Sign, read_sign, sign_path

log = logging.getLogger(__name__)

LOCK = ".lock"


class Owner:
    """The main rank's hold on a run's folder. The system lets go of it with the process, however that ends."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = FileLock(folder / LOCK)

    def take(self) -> None:
        """Make the folder this job's.

        A file system may keep locks of each machine to itself; then the owner's heartbeat tells.

        Raises:
            ConfigError: another job has it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(self._taken(read_sign(self._sign))) from None
        except NotImplementedError:  # a file system without locks
            log.debug("%s: no locks here", self.folder)
        owner = read_sign(self._sign)
        if owner is None or owner.host == socket.gethostname() or owner.end is not None:
            return  # of this machine the lock knows
        log.info("%s was run by pid %d on %s: waiting for a sign of it", self.folder, owner.pid, owner.host)
        time.sleep(3 * BEAT_SECONDS)
        later = read_sign(self._sign)
        if later is not None and later.written != owner.written:
            self._lock.release()
            raise ConfigError(self._taken(later))

    def leave(self) -> None:
        """Let go; a folder in which nothing has begun goes too."""
        if {path.name for path in self.folder.iterdir()} <= {LOCK, FOLDER}:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    @property
    def _sign(self) -> Path:
        return sign_path(self.folder, rank=0)

    def _taken(self, owner: Sign | None) -> str:
        who = "another job"
        if owner is not None:
            who = f"pid {owner.pid} on {owner.host}, started {owner.age:.0f} s before its last sign"
        return f"out ({self.folder}) must belong to one job at a time: {who} trains there; wait for its end, or stop it"
