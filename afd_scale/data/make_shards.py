"""From a teacher's clips to a dataset, on one process or many, through kills.

The clips are cut into parts, one shard each. Processes take turns with the parts. A part is a shard in the growing
dataset and, written after it, a record of what it holds; a job that starts again goes on with the parts that have no
record. Which clips a part has depends on the job alone, so the bytes do not depend on kills or on the number of
processes.
"""

import errno
import hashlib
import json
import logging
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from filelock import FileLock, Timeout

from afd_scale.config import ConfigError
from afd_scale.data.clips import Clip, Codec, Frames, Reject, RejectedError, Teacher, VideoForm
from afd_scale.data.schema import DatasetFacts, TeacherSample
from afd_scale.data.writer import (
    Shard,
    check_finite,
    check_new_folder,
    clips_of_shard,
    finish_dataset,
    make_folder,
    write_shard,
)

log = logging.getLogger(__name__)

T = TypeVar("T")
FIELD = "out"


@dataclass(frozen=True)
class ShardJob:
    """What is made of what.

    Attributes:
        teacher, codec, form: of the clips.
        out: folder of the dataset.
        max_rejects: clips of a process, and in all, that may be unusable; one more stops the job.
        compression: of the shards.
        decoders: threads that read videos ahead.
        field: the user's setting that names `out`, for errors.
    """

    teacher: Teacher
    codec: Codec
    form: VideoForm
    out: Path
    max_rejects: int = 100
    compression: str = "zstd"
    decoders: int = 2
    field: str = FIELD

    @property
    def growing(self) -> Path:
        """The dataset before it has its name."""
        return self.out.with_name(f".{self.out.name}.incomplete")

    @property
    def records(self) -> Path:
        """What a job that starts again must know."""
        return self.out.with_name(f".{self.out.name}.records")

    def facts(self) -> DatasetFacts:
        """Those of its dataset, the number of samples aside."""
        return DatasetFacts(
            latent_shape=self.codec.latent_shape(self.form),
            text_shape=self.codec.text_shape,
            codec=self.codec.name,
            teacher=self.teacher.name,
            num_samples=0,
            provenance={"source": self.teacher.provenance, "form": asdict(self.form)},
        )


class Processes(Protocol):
    """The processes that share a job."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def run_on_main(self, work: Callable[..., Any], *arguments: Any) -> Any: ...

    def first_error(self, error: Exception | None) -> Exception | None: ...


@dataclass(frozen=True)
class Alone:
    """One process."""

    rank: int = 0
    size: int = 1

    def run_on_main(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return work(*arguments)

    def first_error(self, error: Exception | None) -> Exception | None:
        return error


ALONE = Alone()


def make_shards(
    job: ShardJob, processes: Processes = ALONE, on_clips: Callable[[int, int], None] | None = None
) -> DatasetFacts:
    """Make a job's dataset, or what is left of it to make; one that is there already stays as it is.

    Args:
        processes: that share the job, all with the same one.
        on_clips: called with the clips that this process is done with and those it has in all.
    Raises:
        ConfigError: bad input; what is finished stays, and the same job goes on from there.
    """
    done: DatasetFacts | None = processes.run_on_main(_complete, job)
    if done is not None:
        return done
    with _one_job_at_a_time(job, processes):
        processes.run_on_main(_prepare, job)
        error = None
        try:
            _make_parts(job, processes, on_clips or (lambda done, total: None))
        except Exception as problem:  # the others must not wait for ever
            error = problem
        error = processes.first_error(error)
        if error is not None:
            raise error
        facts: DatasetFacts = processes.run_on_main(_finish, job)
    return facts


def _complete(job: ShardJob) -> DatasetFacts | None:
    """The facts of the job's dataset where it is there; refuses a form that the codec does not take."""
    expected = job.facts()
    if not job.out.exists():
        return None
    try:
        there = DatasetFacts.load(job.out, job.field)
    except ConfigError:
        there = None
    if there is None or replace(there, num_samples=0) != expected:
        check_new_folder(job.out, job.field)
    shutil.rmtree(job.records, ignore_errors=True)  # of a job that was killed in its last moment
    return there


def _prepare(job: ShardJob) -> None:
    """Begin, or check that what is there was begun by the same job."""
    make_folder(job.growing, job.out, job.field)
    make_folder(job.records, job.out, job.field)
    for left_over in job.growing.glob(".*.incomplete"):
        shutil.rmtree(left_over, ignore_errors=True)
    clips = job.teacher.clips()
    listed = "\n".join(json.dumps((clip.video, clip.prompt)) for clip in clips)
    facts = job.facts()
    begun = {**json.loads(json.dumps(asdict(facts))), "compression": job.compression, "clips": len(clips),
             "digest": hashlib.blake2b(listed.encode(), digest_size=16).hexdigest()}  # fmt: skip
    record = job.records / "job.json"
    if not record.exists():
        _write(record, json.dumps(begun, indent=1))
        return
    earlier = json.loads(record.read_text())
    different = sorted(name for name in begun if begun[name] != earlier.get(name))
    if different:
        raise ConfigError(f"{job.field} ({job.out}) must be finished as it was begun: {', '.join(different)} differ; "
                          f"delete {job.growing} and {job.records} to start over")  # fmt: skip


def _make_parts(job: ShardJob, processes: Processes, on_clips: Callable[[int, int], None]) -> None:
    clips, facts = job.teacher.clips(), job.facts()
    size = _part_size(job, facts)
    mine = range(processes.rank, -(-len(clips) // size), processes.size)
    total, done, rejects = sum(len(clips[n * size : (n + 1) * size]) for n in mine), 0, 0
    for number in mine:
        part = clips[number * size : (number + 1) * size]
        shard = _recorded(job, number)
        if shard is None:
            shard = _make_part(job, facts, number, part, partial(_report, on_clips, done, total))
        done, rejects = done + len(part), rejects + len(shard.rejects)
        on_clips(done, total)
        _check_rejects(job, rejects, shard)


def _report(on_clips: Callable[[int, int], None], before: int, total: int, clips: int) -> None:
    on_clips(before + clips, total)


def _part_size(job: ShardJob, facts: DatasetFacts) -> int:
    return min(job.teacher.clips_at_once, clips_of_shard(facts))


def _make_part(
    job: ShardJob, facts: DatasetFacts, number: int, part: Sequence[Clip | Reject], on_clip: Callable[[int], None]
) -> Shard:
    rejects: list[Reject] = []

    def samples() -> Iterator[TeacherSample]:
        for position, (clip, frames) in enumerate(_read_ahead(job, part), start=1):
            try:
                if isinstance(clip, Reject):
                    rejects.append(clip)
                else:
                    yield _sample(job, clip, frames)
            except RejectedError as error:
                rejects.append(Reject(clip.video, clip.prompt, str(error)))
            on_clip(position)

    with _full_disk_explained(job):
        shard = replace(write_shard(samples(), facts, job.growing, number, job.compression), rejects=tuple(rejects))
        _write(_record(job, number), shard.to_json())
    for reject in rejects:
        log.warning("rejected %s: %s", reject.video, reject.reason)
    return shard


def _sample(job: ShardJob, clip: Clip, frames: Callable[[], Frames]) -> TeacherSample:
    text = job.codec.embed(clip.prompt)
    latents = job.codec.encode(frames())
    check_finite("latents", latents)
    check_finite("text_embedding", text)
    return TeacherSample(
        prompt=clip.prompt,
        prompt_id=clip.prompt_id,
        text_embedding=text,
        meta={"video": clip.video, "index": clip.index},
        latents=latents,
        teacher=job.teacher.name,
        fps=job.form.fps,
    )


def _read_ahead(job: ShardJob, part: Sequence[Clip | Reject]) -> Iterator[tuple[Clip | Reject, Callable[[], Frames]]]:
    """The clips in their order with a function that waits for their frames, while threads read the next."""
    with ThreadPoolExecutor(job.decoders) as pool:
        waiting: deque[tuple[Clip | Reject, Future[Frames] | None]] = deque()
        coming = iter(part)
        try:
            while True:
                while len(waiting) <= job.decoders and (clip := next(coming, None)) is not None:
                    read = None if isinstance(clip, Reject) else pool.submit(job.teacher.frames, clip, job.form)
                    waiting.append((clip, read))
                if not waiting:
                    return
                clip, read = waiting.popleft()
                yield clip, read.result if read is not None else _no_frames
        finally:
            pool.shutdown(cancel_futures=True)


def _no_frames() -> Frames:
    raise AssertionError("a reject has no frames")


def _check_rejects(job: ShardJob, rejects: int, shard: Shard) -> None:
    if rejects > job.max_rejects:
        last = shard.rejects[-1] if shard.rejects else None
        example = f", the last is {last.video}: {last.reason}" if last else ""
        raise ConfigError(f"max_rejects ({job.max_rejects}) must be at least {rejects}, the clips that could not be "
                          f"used so far{example}; a higher limit goes on from here")  # fmt: skip


def _finish(job: ShardJob) -> DatasetFacts:
    facts, clips = job.facts(), len(job.teacher.clips())
    shards = []
    for number in range(-(-clips // _part_size(job, facts))):
        shard = _recorded(job, number)
        assert shard is not None, "every process made its parts"
        shards.append(shard)
    rejects = [reject for shard in shards for reject in shard.rejects]
    if len(rejects) == clips:
        raise ConfigError(f"source ({job.teacher.name}) must have a clip that can be used: all {clips} were rejected, "
                          f"the first, {rejects[0].video}: {rejects[0].reason}")  # fmt: skip
    for shard in shards:
        if shard.rejects:
            _check_rejects(job, len(rejects), shard)
    with _full_disk_explained(job):
        written = finish_dataset(shards, facts, job.growing, job.out, job.field)
    shutil.rmtree(job.records, ignore_errors=True)
    return written


def _record(job: ShardJob, number: int) -> Path:
    return job.records / f"part.{number:05d}.json"


def _recorded(job: ShardJob, number: int) -> Shard | None:
    path = _record(job, number)
    return Shard.from_json(path.read_text()) if path.exists() else None


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


@contextmanager
def _one_job_at_a_time(job: ShardJob, processes: Processes) -> Iterator[None]:
    lock = FileLock(job.records.with_suffix(".lock"))
    processes.run_on_main(_acquire, job, lock)  # all processes hear of a refusal
    try:
        yield
    finally:
        if processes.rank == 0:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)


def _acquire(job: ShardJob, lock: FileLock) -> None:
    make_folder(job.records, job.out, job.field)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"{job.field} ({job.out}) must be made by one job at a time: another one is at it") from None


@contextmanager
def _full_disk_explained(job: ShardJob) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
            raise
        raise ConfigError(f"{job.field} ({job.out}) must have room: {error.strerror}; finished shards stay, the same "
                          "command goes on from them") from error  # fmt: skip
