"""Shared memory of a machine: room for NCCL and Streaming, and what killed jobs left in it."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from afd_scale.data.leftovers import (
    SHARED_MEMORY,
    Leftover,
    blocks,
    lock_files,
    remove_dead,
    remove_dead_locks,
    unusable,
)
from afd_scale.health.findings import Finding, size_words

TOPIC = "shared memory"
MIB = 2**20

# NCCL's manual asks for 1 GiB in containers, whose default is 64 MiB. Streaming takes 8 bytes a sample and 9 a shard;
# gloo goes by TCP and takes none.
NCCL_BYTES, STREAMING_BYTES = 2**30, 16 * MIB


def check_room(ranks_on_gpus: int, folder: Path = SHARED_MEMORY) -> Finding:
    """Whether there is room for a run of so many ranks with a GPU on this machine; 0 is one on the CPU."""
    if not folder.is_dir():
        return Finding(TOPIC, str(folder), "is not there", "wrong", f"mount -t tmpfs tmpfs {folder}")
    total, _, free = shutil.disk_usage(folder)
    needed = NCCL_BYTES if ranks_on_gpus > 1 else STREAMING_BYTES
    words = f"{size_words(free)} of {size_words(total)} free, {size_words(needed)} needed"
    if free >= needed:
        return Finding(TOPIC, str(folder), words)
    if total >= needed:
        return Finding(TOPIC, str(folder), words, "wrong", f"see `ls -lS {folder}` for what fills it")
    remedy = f"docker: --shm-size=1g or --ipc=host; kubernetes: an emptyDir of medium Memory at {folder}; else "
    return Finding(TOPIC, str(folder), words, "wrong", f"{remedy}mount -o remount,size=2g {folder}")


def check_leftovers(folder: Path = SHARED_MEMORY, temporary: Path | None = None) -> list[Finding]:
    """What Streaming's datasets have there, by who uses it."""
    there = blocks(folder)
    locks = lock_files(there, temporary)
    findings = [_counted("blocks of Streaming", there), _counted("locks of Streaming", locks)]
    if fault := _lasting_fault(folder, {block.path for block in there if block.use != "dead"}):
        findings.append(
            Finding(TOPIC, "a block that is no good", fault, "wrong",
                    "no dataset opens beside it: end the process that has it open (`fuser -v` the file), or let its "
                    "owner remove it")
        )  # fmt: skip
    return findings


def clean(folder: Path = SHARED_MEMORY, temporary: Path | None = None) -> Finding:
    """Remove what certainly no job uses."""
    number = len(remove_dead(folder)), len(remove_dead_locks(temporary, folder))
    return Finding(TOPIC, "removed", f"{number[0]} blocks, {number[1]} lock files of jobs that are gone")


def _counted(what: str, found: Sequence[Leftover]) -> Finding:
    counts = {use: [each for each in found if each.use == use] for use in ("used", "dead", "another user's", "unknown")}
    words = ", ".join(f"{len(each)} {use}" for use, each in counts.items() if each)
    dead = counts["dead"]
    if not dead:
        return Finding(TOPIC, what, words or "none")
    size = sum(each.bytes for each in dead)
    words += f" ({size_words(size)})" if size >= MIB else ""
    return Finding(TOPIC, what, words, "warning", "tools/doctor.py --clean removes the dead ones")


def _lasting_fault(folder: Path, in_use: set[Path]) -> str | None:
    """A block in use that is no good: one that is being made is so for a moment, a dead one a run removes itself."""
    fault = unusable(folder)
    if fault is None or not in_use:
        return None
    time.sleep(0.2)
    again = unusable(folder)
    return again if again == fault and any(fault.startswith(f"{path} ") for path in in_use) else None
