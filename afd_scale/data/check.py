"""Before a run reads its datasets: the toy world's is made where it is absent, and what is not sound is refused."""

import time
from collections.abc import Mapping
from pathlib import Path

from afd_scale.codecs.identity import IdentityCodec
from afd_scale.config import ConfigError, RunConfig
from afd_scale.config.run import DataConfig
from afd_scale.data.make_shards import ShardJob, make_shards
from afd_scale.data.schema import FACTS_FILE, DatasetFacts
from afd_scale.data.storage import Location, evaluation_prompts, extra_prompts, is_remote, locations, teacher_data
from afd_scale.data.teachers.procedural import ProceduralTeacher
from afd_scale.data.validate import KnownGood, check_shard, contradictions, load_beside

_SHARE_SECONDS = 60.0  # between two meetings of ranks that hash


def ensure_dataset(config: DataConfig) -> None:
    """Make the dataset of `config.source` where there is none; call it on one rank.

    Raises:
        ConfigError: the folder cannot be made, or its dataset is of another source.
    """
    if is_remote(config.shards) or config.source is None:
        return
    folder = Path(config.shards)
    teacher = ProceduralTeacher(config.source)
    if folder.exists():
        made_from = DatasetFacts.load(folder, "data.shards").provenance.get("source")
        if made_from != teacher.provenance:
            raise ConfigError(f"data.source ({teacher.provenance}) must be what {folder} was made from, {made_from}: "
                              "to read the folder as it is, give data.source=null")  # fmt: skip
    else:
        make_shards(ShardJob(teacher, IdentityCodec.of_form(teacher.form), teacher.form, folder, field="data.shards"))


def is_to_be_made(config: DataConfig) -> bool:
    """Whether `ensure_dataset` will have something to do."""
    return config.source is not None and not is_remote(config.shards) and not Path(config.shards).exists()


def hash_share(config: RunConfig, rank: int, ranks: int, seconds: float = _SHARE_SECONDS) -> bool:
    """Hash a rank's share of the run's local shards, for a while: terabytes take longer than ranks wait for each other.

    Every shard is hashed by one of the ranks, for reading it again validates nothing, and unpacked there. One that was
    found good is not hashed again while its size and time of change stay. Remote shards are validated as they arrive.

    Returns:
        Whether all of it is done.
    Raises:
        ConfigError: names the first thing that is wrong.
    """
    deadline = time.monotonic() + seconds
    for location in locations(config):
        if not location.is_remote:
            _, _, shards = load_beside(location)
            with KnownGood(location, rank) as known:
                for shard in shards[rank::ranks]:
                    before = len(known.files)
                    check_shard(location, shard, known.files)
                    known.now_and_then()
                    if time.monotonic() > deadline and len(known.files) > before:
                        return False
    return True


def check_dataset(config: RunConfig, hashed: bool = False) -> DatasetFacts:
    """Check that the run's datasets are complete, undamaged and of the run's shapes; call it on one rank.

    Args:
        hashed: `hash_share` was called on all ranks, until all was done.
    Returns:
        The facts of the teacher's.
    Raises:
        ConfigError: names the first thing that is wrong.
    """
    return check_facts(config, {location: check_files(location, hashed) for location in locations(config)})


def check_facts(config: RunConfig, facts: Mapping[Location, DatasetFacts]) -> DatasetFacts:
    """Hold the facts of a run's datasets against its config.

    Returns:
        Those of the teacher's.
    Raises:
        ConfigError: names the first thing that does not fit.
    """
    data, student = config.data, config.student
    text = (student.text_length, student.text_dim)
    for location, found in facts.items():
        _check_shape(location, "text embeddings", "student.text_length, student.text_dim", text, found.text_shape)
    teacher, extra = teacher_data(config), extra_prompts(config)
    names = "data.latent_frames, student.latent_channels, data.latent_height, data.latent_width"
    latents = (data.latent_frames, student.latent_channels, data.latent_height, data.latent_width)
    _check_shape(teacher, "latents", names, latents, facts[teacher].latent_shape)
    _check_batch("data.global_batch", data.global_batch, facts[teacher])
    shown = {location.shards: found for location, found in facts.items()}[evaluation_prompts(config).shards]
    if shown.latent_shape is not None:  # its videos are looked at beside the student's
        _check_shape(evaluation_prompts(config), "latents", names, latents, shown.latent_shape)
        if shown.codec != facts[teacher].codec:
            raise ConfigError(f"evaluation.prompts ({config.evaluation.prompts}) must be of codec "
                              f"{facts[teacher].codec}, as data.shards, or prompts alone: its is {shown.codec}"
                              )  # fmt: skip
    if extra is not None:
        if extra not in facts or facts[extra].latent_shape is not None:
            raise ConfigError(f"data.prompts ({extra.shards}) must hold prompts alone: it holds videos, which would be "
                              "the teacher's")  # fmt: skip
        _check_batch("data.prompts_per_step", data.prompts_per_step, facts[extra])
    return facts[teacher]


def check_copies(config: RunConfig) -> None:
    """Check a machine's copies of the run's remote datasets, as `check_files` does, and bring what lies beside their
    shards up to date; call it on one rank of each machine.
    """
    for location in locations(config):
        if location.is_remote:
            check_files(location)


def check_files(location: Location, hashed: bool = False) -> DatasetFacts:
    """Check that a dataset is complete and undamaged.

    Args:
        hashed: that of its local shards is done.
    Raises:
        ConfigError: names the first thing that is wrong.
    """
    facts, prompts, shards = load_beside(location)
    for wrong in contradictions(facts, prompts, shards):
        raise ConfigError(f"{location.field} ({location.folder}) must be as it was written: {wrong}; make it again")
    if location.is_remote or not hashed:
        with KnownGood(location) as known:
            for shard in shards:
                check_shard(location, shard, known.files)
                known.now_and_then()
    return facts


def _check_shape(
    location: Location, what: str, fields: str, expected: tuple[int, ...], there: tuple[int, ...] | None
) -> None:
    if there != expected:
        raise ConfigError(f"{location.field} ({location.shards}) must hold {what} of shape {expected} ({fields}): "
                          f"its {FACTS_FILE} says {'prompts alone' if there is None else there}")  # fmt: skip


def _check_batch(field: str, batch: int, facts: DatasetFacts) -> None:
    if batch > facts.num_samples:
        raise ConfigError(f"{field} ({batch}) must be at most {facts.num_samples}, the samples of its dataset: "
                          "an epoch is at least one batch")  # fmt: skip
