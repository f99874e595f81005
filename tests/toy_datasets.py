"""Datasets of the toy world, for tests of what reads and writes datasets."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from afd_scale.codecs.identity import IdentityCodec
from afd_scale.config.run import ProceduralSource
from afd_scale.data.make_shards import ShardJob, encode_frames, make_shards
from afd_scale.data.reader import read_rows, videos_of
from afd_scale.data.schema import DatasetFacts, TeacherSample
from afd_scale.data.storage import Location
from afd_scale.data.teachers.procedural import ProceduralTeacher, form_of
from afd_scale.types import Videos


def make_procedural_shards(source: ProceduralSource, folder: Path) -> DatasetFacts:
    """The dataset that a run makes of this source."""
    form = form_of(source.world)
    return make_shards(ShardJob(ProceduralTeacher(source), IdentityCodec.of_form(form), form, folder))


def procedural_samples(source: ProceduralSource) -> Iterator[TeacherSample]:
    """What it holds."""
    teacher, form = ProceduralTeacher(source), form_of(source.world)
    codec = IdentityCodec.of_form(form)
    for clip in teacher.clips():
        yield TeacherSample(
            prompt=clip.prompt,
            prompt_id=clip.prompt_id,
            text_embedding=codec.embed(clip.prompt),
            meta={},
            latents=encode_frames(codec, teacher.frames(clip, form)),
            teacher=teacher.name,
            fps=form.fps,
        )


def read_videos(location: Location, samples: Sequence[int], text_length: int) -> Videos:
    """Look videos up by their position in a dataset."""
    return videos_of(list(read_rows(location, samples)), text_length)
