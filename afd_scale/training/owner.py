"""One run, one owner: two jobs that train into one folder would tear each other's files apart."""

import logging
import os
import shutil
import socket
import time
from pathlib import Path

from afd_scale.config import ConfigError
from afd_scale.files import try_lock
from afd_scale.parallel.heartbeats import BEAT_SECONDS, FOLDER, Sign, read_sign, sign_path

log = logging.getLogger(__name__)

LOCK = ".lock"
LEASE_SECONDS = 120.0  # how long a file server may keep the lock of a machine that is gone: NFS 4 mostly for 90
ONE_JOB = "must belong to one job at a time"


class Owner:
    """The main rank's hold on a run's folder. The system lets go of it with the process, however that ends."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._file: int | None = None

    def take(self) -> None:
        """Make the folder this job's.

        A file system may have no locks, or keep those of each machine to itself; then the owner's heartbeat tells.
        The lock of a machine that is gone may stay for a while.

        Raises:
            ConfigError: another job has it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        owner, locked = read_sign(self._sign), self._lock()
        is_here = owner is None or owner.host == socket.gethostname()  # of this machine the lock knows
        if locked and (owner is None or is_here or owner.end is not None):
            return
        if owner is None or is_here:
            raise ConfigError(self._taken(owner))
        log.info("%s was run by pid %d on %s: waiting for a sign of it", self.folder, owner.pid, owner.host)
        for _ in range(1 if locked else int(LEASE_SECONDS / (3 * BEAT_SECONDS))):
            time.sleep(3 * BEAT_SECONDS)
            later = read_sign(self._sign)
            if later is not None and later.written != owner.written:
                self._let_go()
                raise ConfigError(self._taken(later))
            locked = locked or self._lock()
            if locked:
                return
        raise ConfigError(f"{self._taken(owner)}. It has given no sign for {LEASE_SECONDS:.0f} s; if it is gone, its "
                          f"lock outlives it: remove {self.folder / LOCK}")  # fmt: skip

    def leave(self) -> None:
        """Let go; a folder in which nothing has begun goes too."""
        if {path.name for path in self.folder.iterdir()} <= {LOCK, FOLDER}:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._let_go()

    def _lock(self) -> bool:
        """Whether the file is locked now, or cannot be where it lies."""
        self._file = try_lock(self.folder / LOCK)
        return self._file is not None

    def _let_go(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @property
    def _sign(self) -> Path:
        return sign_path(self.folder, rank=0)

    def _taken(self, owner: Sign | None) -> str:
        who = "another job"
        if owner is not None:
            who = f"pid {owner.pid} on {owner.host}, started {owner.age:.0f} s before its last sign"
        return f"out ({self.folder}) {ONE_JOB}: {who} trains there; wait for its end, or stop it"
