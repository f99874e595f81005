"""Whether the folders of a run have room, can be written to fast enough, and have a clock that agrees."""

import os
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from afd_scale.config import RunConfig
from afd_scale.health.findings import Finding, size_words
from afd_scale.planning.activations import FLOAT32
from afd_scale.planning.memory import ADAM, MASTER, itemsize
from afd_scale.planning.parameters import network_sizes

TOPIC = "disks"
PROBE_BYTES = 64 * 2**20
SPARE_BYTES = 2 * 2**30  # for videos, logs and reports
SLOW_BYTES_PER_SECOND = 50e6  # below it a checkpoint of a 1.3B student takes minutes
CLOCK_SECONDS = 2.0  # file systems keep whole seconds at worst


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    folder = folder.absolute()
    return next(each for each in (folder, *folder.parents) if each.exists())


def checkpoint_bytes(config: RunConfig) -> int:
    """Of one checkpoint: optimizers, averages and the exported weights, all in one."""
    sizes = network_sizes(config)
    total = 0
    for role in config.cast:
        size = sizes[role.name]
        own = size.adapter or size.base
        total += size.trained * (MASTER + ADAM) if role.optimizer is not None else 0
        total += own * FLOAT32 if role.follows else 0
        total += own * itemsize(config) if role.name == config.method.exported else 0
    return total


def needed_for_checkpoints(config: RunConfig) -> int:
    """While the newest is written the others are still there."""
    return (config.train.keep_checkpoints + 1) * checkpoint_bytes(config)


def check_room(what: str, folder: Path, needed: int) -> Finding:
    """Whether as many bytes and some spare ones are free where a folder is, or will be."""
    place = existing(folder)
    free = shutil.disk_usage(place).free
    inodes = os.statvfs(place)
    words = f"{size_words(free)} free" + (f", about {size_words(needed)} needed" if needed else "") + f" ({folder})"
    if free < needed + SPARE_BYTES:
        return Finding(TOPIC, what, words, "wrong" if free < needed or free < SPARE_BYTES / 4 else "warning",
                       f"make room for {size_words(needed + SPARE_BYTES)}, or name a folder on another disk"
                       )  # fmt: skip
    if inodes.f_files and inodes.f_favail < 10_000:
        return Finding(TOPIC, what, f"{words}; {inodes.f_favail} files left", "wrong",
                       "remove small files: the file system has no room for more names")  # fmt: skip
    return Finding(TOPIC, what, words)


def check_writing(
    what: str, folder: Path, size: int = PROBE_BYTES, clock: Callable[[], float] = time.time
) -> list[Finding]:
    """Write a file of 64 MiB where a folder is, or will be, bring it to the disk, and remove it.

    Args:
        clock: of this machine; the file's own time is held against it.
    """
    place = existing(folder)
    probe, block = place / f".doctor-{uuid.uuid4().hex[:8]}", os.urandom(2**20)
    try:
        began, before = time.monotonic(), clock()
        with probe.open("wb", buffering=0) as file:
            for _ in range(max(1, size // len(block))):
                file.write(block)
            written = time.monotonic()
            os.fsync(file.fileno())
        ended, stamp, after = time.monotonic(), probe.stat().st_mtime, clock()
    except OSError as error:
        return [Finding(TOPIC, f"{what}: writing", f"{error.strerror} ({place})", "wrong",
                        "give this user a folder that can be written to")]  # fmt: skip
    finally:
        with suppress(OSError):
            probe.unlink()
    rate = size / (ended - began)
    words = f"{rate / 1e6:.0f} MB/s, of {ended - began:.2f} s {ended - written:.2f} s for fsync ({place})"
    slow = rate < SLOW_BYTES_PER_SECOND
    remedy = "a checkpoint will take long and all ranks wait for it: another disk, or a larger train.save_every"
    return [
        Finding(TOPIC, f"{what}: writing", words, "warning" if slow else "ok", remedy if slow else ""),
        _clock(what, max(before - stamp, stamp - after, 0.0)),
    ]


def _clock(what: str, seconds: float) -> Finding:
    words = f"{seconds:.1f} s off this machine's" if seconds > CLOCK_SECONDS else "agrees with this machine's"
    if seconds > CLOCK_SECONDS:
        return Finding(TOPIC, f"{what}: clock of its files", words, "warning",
                       "set the clocks of machine and file server by NTP (`chronyc tracking`)")  # fmt: skip
    return Finding(TOPIC, f"{what}: clock of its files", words)
