"""A job: a source that is held against a teacher, a student's videos being made first."""

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

from afd_scale.checkpoint.weights import written_whole
from afd_scale.config import ConfigError, one_line
from afd_scale.data.schema import FACTS_FILE, INDEX_FILE
from afd_scale.data.storage import Location, is_remote
from afd_scale.data.video import same_rate
from afd_scale.evaluation.against_teacher import Chunks, Judges, evaluate, open_judges, write_evaluation
from afd_scale.evaluation.clip_sets import ClipSet, FolderClips, ShardClips, common_form
from afd_scale.evaluation.suites.video import LEAST_FRAMES
from afd_scale.files import system_errors
from afd_scale.generation.job import Job, generate
from afd_scale.parallel.ranks import alone

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationJob:
    """A comparison to make.

    Attributes:
        source: folder of videos; or a run, checkpoint, export or weights file, which makes videos first.
        teacher: a dataset, folder or URL, or a folder of videos.
        out: folder to make.
        models: folder or hub id of Wan's text encoder and VAE.
        chunk_frames, first_chunk_frames: frames of a chunk of a folder's videos, and of the first.
        reward_model, vbench: see `open_judges`.
        seed: of what is generated; None is 0.
        lengths: of the teacher's videos, that the source's are measured for; None is one.
        frames: at the teacher's rate, in place of `lengths`: as many whole lengths as they hold are measured.
        clips: of a side at most.
        samples: shown side by side.
        workers: processes that measure.
    """

    source: Path
    teacher: str
    out: Path
    models: str | None = None
    chunk_frames: int | None = None
    first_chunk_frames: int | None = None
    reward_model: Path | None = None
    vbench: str | None = None
    seed: int | None = None
    lengths: int | None = None
    frames: int | None = None
    clips: int = 512
    samples: int = 4
    workers: int = 1

    @property
    def generates(self) -> bool:
        """Whether the source is a student, of whatever layout."""
        marks = ("config.yaml", "config.json", "model_index.json", "state.json", "*.safetensors", "*/*.safetensors")
        return not self.source.is_dir() or any(next(self.source.glob(mark), None) for mark in marks)

    @property
    def made(self) -> Path:
        """Where its videos are until `out` is there, and stay if that cannot be made."""
        return self.out.with_name(f"{self.out.name}.videos")

    @property
    def has_shards(self) -> bool:
        """Whether the teacher is a dataset."""
        return is_remote(self.teacher) or any((Path(self.teacher) / name).exists() for name in (FACTS_FILE, INDEX_FILE))

    def check(self) -> None:
        """Raises ConfigError for what is wrong whatever the videos are; they may take hours."""
        if self.out.exists():
            raise ConfigError(f"out ({self.out}) must not exist: nothing is overwritten")
        if not self.source.exists():
            raise ConfigError(f"source ({self.source}) must exist: there is no such file or folder")
        if self.first_chunk_frames is not None and self.chunk_frames is None:
            raise ConfigError(f"first_chunk_frames ({self.first_chunk_frames}) must not be given without chunk_frames")
        if self.frames is not None and self.lengths is not None:
            raise ConfigError(f"frames ({self.frames}) must not come with lengths: a video has one length")
        if self.generates:
            if self.chunk_frames is not None:
                raise ConfigError(f"chunk_frames ({self.chunk_frames}) must not be given for a student: where its "
                                  "chunks meet is known")  # fmt: skip
            if self.made.exists():
                raise ConfigError(f"out ({self.out}) must not have {self.made} beside it, videos of an earlier "
                                  "attempt: give these as the source, or remove them")  # fmt: skip
        else:
            if self.seed is not None:
                raise ConfigError(f"seed ({self.seed}) must not be given for a folder: nothing is generated")
            if self.models is not None and not self.has_shards:
                raise ConfigError(f"models ({self.models}) must not be given for folders: there are no latents")
        with system_errors(f"out ({self.out}) must be in a folder that can be written to"):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.out.parent).close()


def evaluate_source(job: EvaluationJob) -> None:
    """Make the folder of a comparison.

    Raises:
        ValueError, OSError: it cannot be made; videos that were generated stay in `job.made`, which the line says.
        UnfinishedError: as of `generate`.
    """
    job.check()
    judges = open_judges(job.reward_model, job.vbench)
    with tempfile.TemporaryDirectory(dir=job.out.parent, prefix=f".{job.out.name}.") as cache:
        teacher = _teacher(job, Path(cache))
        _lengths(job, teacher)  # what is wrong with them, before anything is made
        if not job.generates:
            chunks = None if job.chunk_frames is None else (job.first_chunk_frames, job.chunk_frames)
            _compare(job, FolderClips(job.source, "source"), teacher, judges, chunks)
            return
        first_chunk, chunk = _make_videos(job, teacher)
        try:
            source = FolderClips(job.made, "source")
            source.name = job.source.resolve().name
            kept = same_rate(common_form(source, teacher).fps, source.form.fps)
            if not kept:
                log.warning("jumps at chunk borders are not measured: the student's %g frames a second are made the "
                            "teacher's %g", source.form.fps, teacher.form.fps)  # fmt: skip
            _compare(job, source, teacher, judges, (first_chunk, chunk) if kept else None)
            job.made.rename(job.out / "videos")
        except (ValueError, OSError) as error:
            raise ConfigError(f"{one_line(error)}; the videos that were made are in {job.made}, to be given as the "
                              f"source, with --chunk-frames {chunk} --first-chunk-frames {first_chunk}"
                              ) from error  # fmt: skip


def _lengths(job: EvaluationJob, teacher: ClipSet) -> int:
    """How many of the teacher's lengths are measured."""
    if job.frames is None:
        return job.lengths or 1
    if job.frames < 2 * teacher.form.frames:
        raise ConfigError(f"frames ({job.frames}) must be at least {2 * teacher.form.frames}, two lengths of the "
                          "teacher's videos: the source is measured by these")  # fmt: skip
    return job.frames // teacher.form.frames


def _teacher(job: EvaluationJob, cache: Path) -> ClipSet:
    if job.has_shards:
        teacher: ClipSet = ShardClips(Location(job.teacher, cache, "teacher"), job.models)
    else:
        teacher = FolderClips(Path(job.teacher), "teacher")
    if teacher.form.frames < LEAST_FRAMES:
        raise ConfigError(f"teacher ({teacher.name}) must have clips of {LEAST_FRAMES} frames or more: its first has "
                          f"{teacher.form.frames}")  # fmt: skip
    return teacher


def _make_videos(job: EvaluationJob, teacher: ClipSet) -> tuple[int, int]:
    """Let the student make videos of the teacher's prompts, as long as the teacher's or as asked for, and else as it
    was trained. One that was trained to go on from a start is given those of the teacher's videos.

    Returns:
        Frames of the first chunk, and of every other.
    """
    shards = teacher.location if isinstance(teacher, ShardClips) else None
    starts: dict[str, Path] = {}  # of each prompt its first clip
    if isinstance(teacher, FolderClips):
        for clip in teacher.clips:
            starts.setdefault(clip.prompt, teacher.folder / clip.video)
    asked = Job(
        job.source, job.made, prompt=tuple(starts), starts=starts, dataset=shards, max_prompts=job.clips,
        models=job.models, seconds=(job.frames or (job.lengths or 1) * teacher.form.frames) / teacher.form.fps,
        seed=job.seed or 0,
    )  # fmt: skip
    found = generate(asked, alone())
    assert found is not None, "this is the only rank"
    first_chunk, chunk = found["chunk_frames"]
    return first_chunk, chunk


def _compare(job: EvaluationJob, source: ClipSet, teacher: ClipSet, judges: Judges, chunks: Chunks | None) -> None:
    """The folder, whole or not at all."""
    evaluation = evaluate(source, teacher, judges, chunks=chunks, most=job.clips, samples=job.samples,
                          workers=job.workers, lengths=_lengths(job, teacher))  # fmt: skip
    with written_whole(job.out) as partial:
        partial.mkdir()
        write_evaluation(evaluation, partial)
