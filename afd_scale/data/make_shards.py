"""From a teacher's clips to a dataset, on one process or many, through kills.

The clips are cut into parts, one shard each. Processes take turns with the parts. A part is a shard in the growing
dataset and, written after it, a record of what it holds and was made of; a job that starts again makes the parts that
have no record, and those whose clips have changed. Which clips a part has depends on the job alone, so the bytes do not
depend on kills or on the number of processes.
"""

import hashlib
import json
import logging
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from afd_scale.codecs.cleaning import CLEANING
from afd_scale.codecs.codec import Codec, RejectedError, VideoForm
from afd_scale.codecs.conversions import to_float16, to_unit
from afd_scale.config import ConfigError
from afd_scale.data.clips import Clip, Frames, Reject, Teacher
from afd_scale.data.schema import DatasetFacts, PromptSample, TeacherSample
from afd_scale.data.writer import Shard, check_new_folder, clips_of_shard, finish_dataset, make_folder, write_shard
from afd_scale.files import full_disk_explained, only_one, read_json, write_text
from afd_scale.protocols import Processes

log = logging.getLogger(__name__)

Clips = Sequence[Clip | Reject]


class _Part(TypedDict):
    """The record of a part."""

    digest: str
    shard: Shard


_JOB, _PART = TypeAdapter(dict[str, Any]), TypeAdapter(_Part)


@dataclass(frozen=True)
class ShardJob:
    """What is made of what.

    Attributes:
        teacher, codec, form: of the clips; without a form, of their prompts alone.
        out: folder of the dataset.
        max_rejects: clips that may be unusable; one more stops the job.
        compression: of the shards.
        decoders: threads that read videos ahead.
        field: the user's setting that names `out`, for errors.
    """

    teacher: Teacher
    codec: Codec
    form: VideoForm | None
    out: Path
    max_rejects: int = 100
    compression: str = "zstd"
    decoders: int = 2
    field: str = "out"

    @property
    def growing(self) -> Path:
        """The dataset before it has its name."""
        return self.out.with_name(f".{self.out.name}.incomplete")

    @property
    def records(self) -> Path:
        """What a job that starts again must know."""
        return self.out.with_name(f".{self.out.name}.records")

    def facts(self, clips: Clips) -> DatasetFacts:
        """Those of its dataset, the number of samples aside; ConfigError for a form that the codec does not take."""
        return DatasetFacts(
            latent_shape=None if self.form is None else self.codec.latent_shape(self.form),
            text_shape=self.codec.text_shape,
            codec=self.codec.name,
            teacher=self.teacher.name,
            num_samples=0,
            provenance={"source": self.teacher.provenance, "codec": self.codec.provenance, "prompts": CLEANING,
                        "form": self.form and asdict(self.form), "clips": _digest(clips)},
        )  # fmt: skip


class Alone:
    """One process."""

    rank, size, is_main = 0, 1, True

    def run_on_main(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return work(*arguments)

    run_on_all = run_on_main


ALONE = Alone()


def make_shards(
    job: ShardJob, processes: Processes = ALONE, on_clips: Callable[[int, int], None] = lambda done, total: None
) -> DatasetFacts:
    """Make a job's dataset, or what is left of it to make; one that is there already stays as it is.

    Args:
        processes: that share the job, all with the same one.
        on_clips: called with the clips that this process is done with and those it has in all.
    Raises:
        ConfigError: bad input; what is finished stays, and the same job goes on from there.
    """
    clips: Clips = processes.run_on_main(job.teacher.clips)
    facts = job.facts(clips)
    written: DatasetFacts | None = processes.run_on_main(_complete, job, facts)
    if written is not None:
        return written
    size = min(job.teacher.clips_at_once, clips_of_shard(facts))
    parts = [clips[begin : begin + size] for begin in range(0, len(clips), size)]
    with ExitStack() as alone:
        processes.run_on_main(_prepare, job, facts, len(parts), alone)
        _make_parts(job, facts, parts, processes, on_clips)
        return processes.run_on_main(_finish, job, facts, len(parts))


def _complete(job: ShardJob, expected: DatasetFacts) -> DatasetFacts | None:
    """The facts of the job's dataset where it is there; ConfigError where another is."""
    if not job.out.exists():
        return None
    try:
        there = DatasetFacts.load(job.out, job.field)
    except ConfigError:
        there = None
    if there is None or _compared(replace(there, num_samples=0)) != _compared(expected):
        check_new_folder(job.out, job.field)
    shutil.rmtree(job.records, ignore_errors=True)  # of a job that was killed in its last moment
    return there


def _compared(facts: DatasetFacts) -> dict[str, Any]:
    """What two jobs must have in common; how prompts are cleaned shows in the clips, so another version that leaves
    these as they are makes the same dataset, and so did those from before there was a record of it."""
    compared: dict[str, Any] = json.loads(json.dumps(asdict(facts)))
    compared["provenance"].pop("prompts", None)
    return compared


def _prepare(job: ShardJob, facts: DatasetFacts, parts: int, alone: ExitStack) -> None:
    """Begin, or check that what is there was begun by the same job, and drop parts that are there no more.

    Args:
        alone: keeps other jobs out until it ends.
    """
    make_folder(job.growing, job.out, job.field)
    make_folder(job.records, job.out, job.field)
    alone.enter_context(only_one(job.records / "lock", f"{job.field} ({job.out}) must be made by one job at a time"))
    begun = {**_compared(facts), "compression": job.compression}
    del begun["provenance"]["clips"]  # a part knows its own
    record = job.records / "job.json"
    if not record.exists():
        with full_disk_explained(job.out, job.field):
            write_text(record, json.dumps(begun, indent=1))
    remedy = f"; delete {job.growing} and {job.records} to start over"
    earlier = read_json(record, job.field, "be what the job was begun with", _JOB, remedy)
    different = sorted(name for name in begun if begun[name] != earlier.get(name))
    if different:
        raise ConfigError(f"{job.field} ({job.out}) must be finished as it was begun: {', '.join(different)} differ; "
                          f"delete {job.growing} and {job.records} to start over")  # fmt: skip
    for left_over in job.growing.glob(".*.incomplete"):
        shutil.rmtree(left_over, ignore_errors=True)
    for path in [*job.records.glob("part.*.json"), *job.growing.glob("shard.*")]:
        if int(path.name.split(".")[1]) >= parts:
            path.unlink()


def _make_parts(
    job: ShardJob, facts: DatasetFacts, parts: list[Clips], processes: Processes, on_clips: Callable[[int, int], None]
) -> None:
    """In rounds of a part for each process, so that all hear of an error, and of too many rejects, at the next."""
    rejects, done = 0, 0
    total = sum(map(len, parts[processes.rank :: processes.size]))

    def make(number: int) -> int:
        if number >= len(parts):
            return 0
        _make_part(job, facts, number, parts[number], lambda clips: on_clips(done + clips, total))
        return len(parts[number])

    for begin in range(0, len(parts), processes.size):
        this_round = range(begin, min(begin + processes.size, len(parts)))
        done += processes.run_on_all(make, begin + processes.rank)
        on_clips(done, total)
        rejects = processes.run_on_main(_count_rejects, job, this_round, rejects)


def _make_part(job: ShardJob, facts: DatasetFacts, number: int, part: Clips, on_clip: Callable[[int], None]) -> None:
    """Make a part unless it is there, made of the same clips."""
    prints = [job.teacher.fingerprint(clip) for clip in part if isinstance(clip, Clip)]
    digest = _digest(part, *prints)
    if _record(job, number).exists() and _recorded(job, number)[0] == digest:
        return
    _record(job, number).unlink(missing_ok=True)  # first, for what has one counts as made
    for left_over in job.growing.glob(f"shard.{number:05d}.*"):
        left_over.unlink()
    rejects: list[Reject] = []

    def samples() -> Iterator[PromptSample]:
        for position, (clip, reading) in enumerate(_read_ahead(job, part), start=1):
            if isinstance(clip, Reject):
                rejects.append(clip)
            else:
                try:
                    yield _sample(job, clip, reading)
                except RejectedError as error:
                    rejects.append(Reject(clip.video, clip.prompt, str(error)))
            on_clip(position)

    with full_disk_explained(job.out, job.field):
        shard = replace(write_shard(samples(), facts, job.growing, number, job.compression), rejects=tuple(rejects))
        write_text(_record(job, number), json.dumps({"digest": digest, "shard": asdict(shard)}))
    for reject in rejects:
        log.warning("rejected %s: %s", reject.video, reject.reason)


def encode_frames(codec: Codec, frames: Frames) -> NDArray[np.float16]:
    """(F, C, H, W) latents of a video, as shards hold them.

    Raises:
        RejectedError: float16 cannot hold them.
    """
    return to_float16(codec.encode(to_unit(frames)[None])[0], "latents")


def _sample(job: ShardJob, clip: Clip, reading: Future[Frames | None]) -> PromptSample:
    meta = {"video": clip.video, "index": clip.index, "split": clip.split}
    sample = PromptSample(clip.prompt, clip.prompt_id, job.codec.embed(clip.prompt), meta)
    frames = reading.result()
    if job.form is None or frames is None:
        return sample
    latents = encode_frames(job.codec, frames)
    return TeacherSample(**vars(sample), latents=latents, teacher=job.teacher.name, fps=job.form.fps)


def _read_ahead(job: ShardJob, part: Clips) -> Iterator[tuple[Clip | Reject, Future[Frames | None]]]:
    """The clips in their order with their frames, if they have any, while threads read the next."""

    def read(clip: Clip | Reject) -> Frames | None:
        return None if job.form is None or isinstance(clip, Reject) else job.teacher.frames(clip, job.form)

    waiting: deque[tuple[Clip | Reject, Future[Frames | None]]] = deque()
    with ThreadPoolExecutor(job.decoders) as pool:
        try:
            for clip in part:
                waiting.append((clip, pool.submit(read, clip)))
                if len(waiting) > job.decoders:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            pool.shutdown(cancel_futures=True)


def _count_rejects(job: ShardJob, numbers: range, before: int) -> int:
    """Rejects up to these parts; ConfigError where they are too many."""
    rejects = [reject for number in numbers for reject in _recorded(job, number)[1].rejects]
    count = before + len(rejects)
    if count > job.max_rejects and rejects:
        last = rejects[-1]
        raise ConfigError(f"max_rejects ({job.max_rejects}) must be at least {count}, the clips that could not be used "
                          f"so far, the last is {last.video}: {last.reason}; "
                          "a higher limit goes on from here")  # fmt: skip
    return count


def _finish(job: ShardJob, facts: DatasetFacts, parts: int) -> DatasetFacts:
    shards = [_recorded(job, number)[1] for number in range(parts)]
    rejects = [reject for shard in shards for reject in shard.rejects]
    if not any(shard.samples for shard in shards):
        raise ConfigError(f"source ({job.teacher.name}) must have a clip that can be used: all {len(rejects)} were "
                          f"rejected, the first, {rejects[0].video}: {rejects[0].reason}")  # fmt: skip
    with full_disk_explained(job.out, job.field):
        written = finish_dataset(shards, facts, job.growing, job.out, job.field)
    shutil.rmtree(job.records, ignore_errors=True)
    return written


def _digest(clips: Clips, *more: str) -> str:
    listed = json.dumps([*(asdict(clip) for clip in clips), *more])
    return hashlib.blake2b(listed.encode(), digest_size=16).hexdigest()


def _record(job: ShardJob, number: int) -> Path:
    return job.records / f"part.{number:05d}.json"


def _recorded(job: ShardJob, number: int) -> tuple[str, Shard]:
    """Of a part that is made: what it was made of, and what it holds."""
    record = read_json(
        _record(job, number), job.field, "be a part's record", _PART, "; delete it, the part is made again"
    )
    return record["digest"], record["shard"]
